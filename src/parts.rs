//! What the threads of kernels share: the next block, and the thread pool of a process.
//!
//! `make loom` checks this, and `job`, by the models of `models`.

#[cfg(loom)]
use loom::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::ptr::null_mut;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// Gives each of the numbers below `end` to one thread.
pub(crate) struct Counter {
    next: AtomicUsize,
    end: usize,
}

impl Counter {
    pub(crate) fn new(end: usize) -> Self {
        Self { next: AtomicUsize::new(0), end }
    }

    /// A number that no thread has had; `None` when there are no more.
    pub(crate) fn next(&self) -> Option<usize> {
        let i = self.next.fetch_add(1, Ordering::Relaxed);
        (i < self.end).then_some(i)
    }

    /// From now on there are no more.
    pub(crate) fn stop(&self) {
        // No plain store: loom lets an addition of another thread end up behind one.
        self.next.fetch_max(self.end, Ordering::Relaxed);
    }
}

struct Tagged<T> {
    process: u32,
    value: T,
}

/// A value of this process, made when it is first asked for. A child of `fork` inherits the address of its parent's
/// value, which may be one of threads that the child does not have. So it makes its own, and leaves the inherited one
/// alone.
pub(crate) struct OfProcess<T>(AtomicPtr<Tagged<T>>);

impl<T: Send + Sync> OfProcess<T> {
    #[cfg(not(loom))]
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    // Loom's is no constant.
    #[cfg(loom)]
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    /// The value of a process; `None` if it cannot be made. Threads that ask at the same time get one value.
    pub(crate) fn get(&'static self, process: u32, make: impl Fn() -> Option<T>) -> Option<&'static T> {
        loop {
            let current = self.0.load(Ordering::Acquire);
            // SAFETY: a value, once published, is never freed.
            if let Some(found) = unsafe { current.as_ref() }
                && found.process == process
            {
                return Some(&found.value);
            }
            let new = Box::into_raw(Box::new(Tagged { process, value: make()? }));
            if self.0.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
                // SAFETY: another thread published its value first, so this one is still ours alone.
                drop(unsafe { Box::from_raw(new) });
            }
        }
    }
}
