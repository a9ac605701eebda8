//! What the tests write: sectors that tell when and where they were written.

/// Bytes of a sector.
pub(crate) const SECTOR: usize = 512;

/// The value that operation `operation` writes to a sector. Never 0, which stands for a sector of zeros; tells both
/// when and where it was written.
pub(crate) fn stamp(operation: u64, sector: u64) -> u64 {
    (operation + 1) << 16 | sector
}

/// The value of a sector that cannot be read: nobody writes it.
pub(crate) const UNREADABLE: u64 = u64::MAX;

/// The bytes of a value.
pub(crate) fn fill(buffer: &mut [u8], first_sector: u64, value: impl Fn(u64) -> u64) {
    for (sector, bytes) in (first_sector..).zip(buffer.chunks_exact_mut(SECTOR)) {
        for word in bytes.as_chunks_mut::<8>().0 {
            *word = value(sector).to_le_bytes();
        }
    }
}

/// The values in bytes read from a disk; an error for a sector that no write ever wrote as a whole.
pub(crate) fn values(bytes: &[u8], first_sector: u64) -> Result<Vec<u64>, String> {
    let mut values = Vec::with_capacity(bytes.len() / SECTOR);
    for (sector, bytes) in (first_sector..).zip(bytes.chunks_exact(SECTOR)) {
        let words = bytes.as_chunks::<8>().0;
        if words.iter().any(|word| word != &words[0]) {
            return Err(format!("sector {sector} holds parts of several writes"));
        }
        values.push(u64::from_le_bytes(words[0]));
    }
    Ok(values)
}
