//! Memory for a program that lives for milliseconds: blocks are laid one behind the other, and only the last one is taken
//! back. The C library's allocator gets what is large, and everything once the room is full.
//!
//! A general allocator writes to memory in many places, which costs a page fault each; after a clone it costs a copied
//! page besides.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Blocks from this size up are not laid here.
const LARGE: usize = 32 << 10;

/// An allocator with room for `SIZE` bytes, which cost nothing until they are touched.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Arena<const SIZE: usize> {
    room: UnsafeCell<[u8; SIZE]>,
    /// Where in the room the next block begins at the earliest.
    next: AtomicUsize,
}

// SAFETY: a part of the room belongs to whoever got it by a successful exchange of `next`, until that gives it back by
// another.
unsafe impl<const SIZE: usize> Sync for Arena<SIZE> {}

impl<const SIZE: usize> Arena<SIZE> {
    #[expect(clippy::new_without_default, reason = "a static is made by a constant function")]
    pub const fn new() -> Self {
        Self { room: UnsafeCell::new([0; SIZE]), next: AtomicUsize::new(0) }
    }

    /// Lays nothing here any more: for a program that stays, to which memory that is never reused would be lost.
    pub fn close(&self) {
        self.next.store(usize::MAX, Ordering::Relaxed);
    }

    /// The block's place in the room, if it is in it.
    fn place(&self, block: *mut u8) -> Option<usize> {
        let place = block.addr().checked_sub(self.room.get().addr())?;
        (place < SIZE).then_some(place)
    }

    /// Moves the end of what is taken, if it is still where it was.
    fn moved(&self, from: usize, to: usize) -> bool {
        self.next.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn take(&self, layout: Layout) -> Option<*mut u8> {
        if layout.size() >= LARGE {
            return None;
        }
        let start = self.room.get().cast::<u8>();
        loop {
            let next = self.next.load(Ordering::Relaxed);
            let from = start.addr().checked_add(next)?;
            let place = from.checked_next_multiple_of(layout.align())? - start.addr();
            let end = place.checked_add(layout.size()).filter(|end| *end <= SIZE)?;
            if self.moved(next, end) {
                // SAFETY: `place` is at most `SIZE`.
                return Some(unsafe { start.add(place) });
            }
        }
    }
}

// SAFETY: a block is a part of the room that overlaps no other block and is large enough and aligned as asked for; or it
// is the system allocator's, which is told from one of the room by its address.
unsafe impl<const SIZE: usize> GlobalAlloc for Arena<SIZE> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match self.take(layout) {
            Some(block) => block,
            // SAFETY: the caller's word.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(block) = self.take(layout) else {
            // SAFETY: the caller's word.
            return unsafe { System.alloc_zeroed(layout) };
        };
        // SAFETY: a fresh block of this size. It may have been another's before.
        unsafe { block.write_bytes(0, layout.size()) };
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match self.place(block) {
            // The last one; any other stays.
            Some(place) => {
                self.moved(place + layout.size(), place);
            }
            // SAFETY: the caller's word, and it was not laid here.
            None => unsafe { System.dealloc(block, layout) },
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(place) = self.place(block) else {
            // SAFETY: the caller's word, and it was not laid here.
            return unsafe { System.realloc(block, layout, size) };
        };
        if place + size <= SIZE && self.moved(place + layout.size(), place + size) || size <= layout.size() {
            return block;
        }
        // SAFETY: the caller's word: the size is not zero, and with this alignment not too large.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        // SAFETY: as above.
        let other = unsafe { self.alloc(wanted) };
        if !other.is_null() {
            // SAFETY: both are there with at least this many bytes, and apart.
            unsafe { other.copy_from_nonoverlapping(block, layout.size()) };
        }
        other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block that knows what it holds.
    struct Held<'a, const SIZE: usize> {
        arena: &'a Arena<SIZE>,
        block: *mut u8,
        layout: Layout,
        mark: u8,
    }

    impl<'a, const SIZE: usize> Held<'a, SIZE> {
        fn new(arena: &'a Arena<SIZE>, size: usize, align: usize, mark: u8) -> Self {
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: the size is not zero.
            let block = unsafe { arena.alloc_zeroed(layout) };
            assert!(!block.is_null() && block.addr().is_multiple_of(align));
            let held = Self { arena, block, layout, mark };
            assert!(held.bytes().iter().all(|b| *b == 0));
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(mark, size) };
            held
        }

        fn bytes(&self) -> &[u8] {
            // SAFETY: the block has this size and is initialised.
            unsafe { std::slice::from_raw_parts(self.block, self.layout.size()) }
        }

        fn resize(&mut self, size: usize) {
            let before = self.layout.size().min(size);
            // SAFETY: the block was made with this layout, and the size is not zero.
            self.block = unsafe { self.arena.realloc(self.block, self.layout, size) };
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            // SAFETY: the block has at least this size.
            let kept = unsafe { std::slice::from_raw_parts(self.block, before) };
            assert!(kept.iter().all(|b| *b == self.mark));
            // SAFETY: as above.
            unsafe { self.block.write_bytes(self.mark, size) };
        }

        fn is_in_room(&self) -> bool {
            self.arena.place(self.block).is_some()
        }
    }

    impl<const SIZE: usize> Drop for Held<'_, SIZE> {
        fn drop(&mut self) {
            assert!(self.bytes().iter().all(|b| *b == self.mark), "somebody else wrote here");
            // SAFETY: the block was made with this layout.
            unsafe { self.arena.dealloc(self.block, self.layout) };
        }
    }

    #[test]
    fn the_last_block_grows_and_is_taken_back() {
        let arena = Arena::<4096>::new();
        let mut first = Held::new(&arena, 100, 1, 1);
        let at = first.block;
        first.resize(200);
        assert_eq!(first.block, at);
        let second = Held::new(&arena, 8, 64, 2);
        first.resize(300);
        assert_ne!(first.block, at);
        let there = first.block;
        drop(first);
        assert_eq!(Held::new(&arena, 10, 4, 3).block, there);
        drop(second);
    }

    #[test]
    fn what_has_no_room_is_the_systems() {
        let arena = Arena::<65536>::new();
        assert!(!Held::new(&arena, LARGE, 8, 1).is_in_room());
        let mut grown = Held::new(&arena, LARGE - 1, 8, 2);
        assert!(grown.is_in_room());
        grown.resize(65537);
        assert!(!grown.is_in_room());
        let full = Held::new(&arena, LARGE - 1, 1, 3);
        assert!(full.is_in_room());
        arena.close();
        assert!(!Held::new(&arena, 1, 1, 4).is_in_room());
        drop(full);
        assert!(!Held::new(&arena, 1, 1, 5).is_in_room());
    }

    #[test]
    fn blocks_of_several_threads_do_not_overlap() {
        let arena = Arena::<{ 64 << 10 }>::new();
        std::thread::scope(|scope| {
            for mark in 1..=4_u8 {
                let arena = &arena;
                scope.spawn(move || {
                    let (mut held, mut seed) = (Vec::new(), u64::from(mark));
                    for _ in 0..5000 {
                        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let (size, align) = ((seed >> 33) as usize % 500 + 1, 1 << ((seed >> 50) % 6));
                        match (seed >> 60) % 3 {
                            0 if !held.is_empty() => drop(held.swap_remove(size % held.len())),
                            1 if !held.is_empty() => {
                                let at = size % held.len();
                                Held::resize(&mut held[at], size);
                            }
                            _ => held.push(Held::new(arena, size, align, mark)),
                        }
                    }
                });
            }
        });
    }
}
