//! Damage: the values that break arithmetic, put where they are read.

use fastrand::Rng;

/// Values at the edges of what fields can hold.
const EDGES: &[u64] = &[
    0,
    1,
    2,
    63,
    64,
    504,
    511,
    512,
    2047,
    2048,
    2049,
    131_072,
    4_186_127,
    4_186_128,
    536_870_911,
    536_870_912,
    0x312E_3276,
    0x746F_6E59,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFE,
    0xFFFF_FFFF,
    0x1_0000_0000,
    (1 << 54) - 1,
    1 << 54,
    u64::MAX - 1,
    u64::MAX,
];

/// An edge value or, now and then, any value.
pub fn edge(random: &mut Rng) -> u64 {
    if random.u8(..8) == 0 { random.u64(..) } else { random.choice(EDGES).copied().unwrap_or(0) }
}

/// Plain random bytes.
pub fn bytes(random: &mut Rng) -> Vec<u8> {
    let len = random.usize(..300);
    (0..len).map(|_| random.u8(..)).collect()
}

/// Damages `input` in up to eight places: flipped bits, edge values, cuts, doubled and inserted pieces.
pub fn damage(random: &mut Rng, input: &mut Vec<u8>) {
    for _ in 0..random.usize(..8) {
        if input.is_empty() {
            return;
        }
        let at = random.usize(..input.len());
        match random.u8(..6) {
            0 => input[at] ^= 1 << random.u8(..8),
            1 => put(input, at & !3, &edge(random).to_le_bytes()[..4]),
            2 => put(input, at & !7, &edge(random).to_le_bytes()),
            3 => input.truncate(at),
            4 => {
                let end = (at + random.usize(1..64)).min(input.len());
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                let fresh = bytes(random);
                input.splice(at..at, fresh);
            }
        }
    }
}

/// Overwrites as much of `bytes` as fits at `at`.
pub fn put(input: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(target) = input.get_mut(at..) {
        let len = target.len().min(bytes.len());
        target[..len].copy_from_slice(&bytes[..len]);
    }
}
