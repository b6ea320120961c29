//! Tiles: [`LANES`] numbers that lie next to each other in memory.

use super::isa::LANES;

/// Reads a tile.
///
/// # Safety
/// [`LANES`] numbers may be read there.
#[inline(always)]
#[must_use]
pub unsafe fn read_tile<T: Copy>(address: *const T) -> [T; LANES] {
    // SAFETY: what the caller promises.
    unsafe { address.cast::<[T; LANES]>().read() }
}

/// Writes a tile.
///
/// # Safety
/// [`LANES`] numbers may be written there.
#[inline(always)]
pub unsafe fn write_tile<T: Copy>(address: *mut T, tile: [T; LANES]) {
    // SAFETY: what the caller promises.
    unsafe { address.cast::<[T; LANES]>().write(tile) }
}
