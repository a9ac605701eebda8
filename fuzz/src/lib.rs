//! Seeded fuzzers on the stable compiler, as an ordinary program: `fuzz NAME SEED`, `fuzz smoke`, `fuzz canary`.
//!
//! A fuzzer is a plain function of bytes that must not panic, plus a generator that makes interesting bytes from a
//! seed: a valid input, damaged where it hurts. Everything random comes from the seed, so the line that a failure
//! prints repeats it.

pub mod format;
pub mod mutate;
pub mod ops;
pub mod partitions;
pub mod repair;
pub mod wire;

/// One fuzzer.
pub struct Fuzzer {
    /// The name one types.
    pub name: &'static str,
    /// Its part of the time of a smoke run.
    pub weight: u32,
    /// Makes an input from a seed.
    pub generate: fn(&mut fastrand::Rng) -> Vec<u8>,
    /// Must neither panic nor hang, whatever the input.
    pub run: fn(&[u8]),
}

/// Every fuzzer, the canaries last, without weight: they fail on purpose, to test the alarm.
pub const FUZZERS: &[Fuzzer] = &[
    Fuzzer { name: "open", weight: 8, generate: format::image, run: format::open },
    Fuzzer { name: "image_ops", weight: 12, generate: ops::input, run: ops::run },
    Fuzzer { name: "bat_arith", weight: 2, generate: format::header_and_entry, run: format::bat_arith },
    Fuzzer { name: "descriptor", weight: 6, generate: format::xml, run: format::descriptor },
    Fuzzer { name: "check_repair", weight: 6, generate: format::image, run: repair::check_repair },
    Fuzzer { name: "dirty_bitmap", weight: 4, generate: repair::bitmaps, run: repair::dirty_bitmap },
    Fuzzer { name: "partitions", weight: 2, generate: partitions::disk, run: partitions::run },
    Fuzzer { name: "wire", weight: 8, generate: wire::stream, run: wire::decode },
    Fuzzer { name: "planted", weight: 0, generate: ops::input, run: ops::run_with_planted_bug },
    Fuzzer { name: "canary", weight: 0, generate: mutate::bytes, run: canary },
];

/// The alarm: refuses one input in 256.
fn canary(input: &[u8]) {
    assert!(input.first() != Some(&0x42), "the canary sings");
}
