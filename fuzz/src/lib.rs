//! Seeded fuzzers on the stable compiler, as an ordinary program: `fuzz NAME SEED`, `fuzz smoke`, `fuzz canary`.
//!
//! A fuzzer is a plain function of bytes that must not panic, plus a generator that makes interesting bytes from a
//! seed: a valid input, damaged where it hurts. Everything random comes from the seed, so the line that a failure
//! prints repeats it.

pub mod format;
pub mod mutate;
pub mod wire;

/// One fuzzer.
pub struct Fuzzer {
    /// The name one types.
    pub name: &'static str,
    /// Makes an input from a seed.
    pub generate: fn(&mut fastrand::Rng) -> Vec<u8>,
    /// Must neither panic nor hang, whatever the input.
    pub run: fn(&[u8]),
}

/// Every fuzzer, the canary last: it fails on purpose, to test the alarm.
pub const FUZZERS: &[Fuzzer] = &[
    Fuzzer { name: "open", generate: format::image, run: format::open },
    Fuzzer { name: "bat_arith", generate: format::header_and_entry, run: format::bat_arith },
    Fuzzer { name: "descriptor", generate: format::xml, run: format::descriptor },
    Fuzzer { name: "wire", generate: wire::stream, run: wire::decode },
    Fuzzer { name: "canary", generate: mutate::bytes, run: canary },
];

/// The alarm: refuses one input in 256.
fn canary(input: &[u8]) {
    assert!(input.first() != Some(&0x42), "the canary sings");
}
