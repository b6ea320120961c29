//! The thread pool of the kernels. It is built at the first large call, and built again in a forked child.
//!
//! Work is cut into blocks whose bounds depend only on the sizes, and not on the number of threads. The sums `s_b` of
//! the blocks are added in the order of the blocks. So results are the same, bit for bit, for any number of threads.

pub(crate) use crate::team::team;
pub use crate::team::{has_openmp, on_team, set_openmp};

use crate::parts::Counter;
use std::cell::Cell;
use std::panic::resume_unwind;
use std::time::{Duration, Instant};

/// The pool of this process; `None` if the system gives no threads.
#[cfg(not(loom))]
fn pool() -> Option<&'static rayon::ThreadPool> {
    use crate::parts::OfProcess;
    static POOL: OfProcess<rayon::ThreadPool> = OfProcess::new();
    POOL.get(std::process::id(), || {
        rayon::ThreadPoolBuilder::new()
            .num_threads(std::thread::available_parallelism().map_or(1, usize::from))
            .thread_name(|i| format!("rgd-{i}"))
            .build()
            .ok()
    })
}

/// Loom runs the models of `parts`, and not rayon.
#[cfg(loom)]
fn pool() -> Option<&'static rayon::ThreadPool> {
    None
}

/// Why a kernel was stopped. The kernel unwinds with this as its payload; its outputs may be partly written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// This number of bytes could not be allocated.
    OutOfMemory(usize),
    /// The function given to [`watch`] returned true.
    Interrupted,
}

impl Stop {
    /// Stops the kernel that is running.
    pub fn raise(self) -> ! {
        resume_unwind(Box::new(self))
    }
}

/// `count` copies of a value; stops the kernel if they do not fit into memory.
pub fn filled<T: Clone>(count: usize, value: T) -> Vec<T> {
    let mut vector = with_capacity(count);
    vector.resize(count, value);
    vector
}

/// An empty vector with room for `count` elements; stops the kernel if they do not fit into memory.
#[must_use]
pub fn with_capacity<T>(count: usize) -> Vec<T> {
    let mut vector = Vec::new();
    if vector.try_reserve_exact(count).is_err() {
        Stop::OutOfMemory(count.saturating_mul(size_of::<T>())).raise();
    }
    vector
}

/// How long a kernel runs before it checks for an interrupt.
const PATIENCE: Duration = Duration::from_millis(200);

/// The function that says whether this thread was interrupted, and the time of its last call, or of the kernel's start.
#[derive(Clone, Copy)]
struct Watch {
    interrupted: fn() -> bool,
    last: Instant,
}

thread_local! {
    static WATCH: Cell<Option<Watch>> = const { Cell::new(None) };
}

/// Runs `kernel`, and stops it with [`Stop::Interrupted`] soon after `interrupted` returns true. `interrupted` is
/// called on this thread, between blocks, at most once in 0.2 s.
pub fn watch<R>(interrupted: fn() -> bool, kernel: impl FnOnce() -> R) -> R {
    struct Restore(Option<Watch>);
    impl Drop for Restore {
        fn drop(&mut self) {
            WATCH.set(self.0);
        }
    }
    let _restore = Restore(WATCH.replace(Some(Watch { interrupted, last: Instant::now() })));
    kernel()
}

/// Whether it is time to check for an interrupt, and there is one.
fn is_interrupted() -> bool {
    let Some(watch) = WATCH.get() else { return false };
    let now = Instant::now();
    let due = now - watch.last >= PATIENCE;
    if due {
        WATCH.set(Some(Watch { last: now, ..watch }));
    }
    due && (watch.interrupted)()
}

/// Stops the running kernel if it is time to check for an interrupt, and there is one. [`for_each_block`] does this
/// itself; other long loops on one thread must call it.
pub fn stop_if_interrupted() {
    if is_interrupted() {
        Stop::Interrupted.raise();
    }
}

/// A number of elements for which a loop on one thread takes much less time than [`PATIENCE`].
pub const STRETCH: usize = 1 << 22;

/// Calls `block(i)` once for every `i` below `blocks`, on at most `threads` threads, the calling one among them.
pub fn for_each_block(blocks: usize, threads: usize, block: impl Fn(usize) + Sync) {
    let workers = threads.min(blocks);
    let team = if workers > 1 { team() } else { None };
    let pool = if workers > 1 && team.is_none() { pool() } else { None };
    if team.is_none() && pool.is_none() {
        for i in 0..blocks {
            if i > 0 {
                stop_if_interrupted();
            }
            block(i);
        }
        return;
    }
    let counter = Counter::new(blocks);
    let work = |calling: bool| {
        while let Some(i) = counter.next() {
            if calling && is_interrupted() {
                counter.stop();
                Stop::Interrupted.raise();
            }
            block(i);
        }
    };
    if let Some(team) = team {
        team.run(threads, &counter, &work);
    } else if let Some(pool) = pool {
        pool.in_place_scope(|scope| {
            for _ in 1..workers {
                scope.spawn(|_| work(false));
            }
            work(true);
        });
    }
}

/// `block(i)` for every `i` below `blocks`, in the order of `i`.
pub fn map_blocks<R: Send + Clone + Default>(
    blocks: usize,
    threads: usize,
    block: impl Fn(usize) -> R + Sync,
) -> Vec<R> {
    let mut results = filled(blocks, R::default());
    let out = crate::layout::Shared(results.as_mut_ptr());
    for_each_block(blocks, threads, |i| {
        // SAFETY: each block writes its own result, and `results` outlives the call.
        unsafe { out.part(i, i + 1)[0] = block(i) };
    });
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_block_runs_once_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 64] {
            for blocks in [0, 1, 2, 7, 1000] {
                assert_eq!(map_blocks(blocks, threads, |i| i + 1), (1..=blocks).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn calls_from_many_threads_do_not_disturb_each_other() {
        std::thread::scope(|scope| {
            for k in 0..8 {
                scope.spawn(move || {
                    for _ in 0..50 {
                        assert_eq!(map_blocks(40, 4, |i| i * k), (0..40).map(|i| i * k).collect::<Vec<_>>());
                    }
                });
            }
        });
    }

    #[test]
    fn an_interrupt_is_asked_for_between_blocks_and_stops_every_thread() {
        for threads in [1, 2] {
            let run = AtomicUsize::new(0);
            let caught = std::panic::catch_unwind(|| {
                watch(
                    || true,
                    || {
                        for_each_block(1000, threads, |_| {
                            run.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(5));
                        });
                    },
                );
            });
            assert_eq!(caught.unwrap_err().downcast_ref(), Some(&Stop::Interrupted));
            assert!((2..200).contains(&run.into_inner()));
            assert!(WATCH.get().is_none());
        }
    }

    #[test]
    fn memory_that_is_not_there_is_told_in_bytes() {
        let caught = std::panic::catch_unwind(|| filled(usize::MAX / 8, 0.0f64));
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&Stop::OutOfMemory(usize::MAX / 8 * 8)));
    }

    #[test]
    fn a_panic_in_a_block_reaches_the_caller_and_leaves_the_pool_usable() {
        let caught = std::panic::catch_unwind(|| for_each_block(8, 4, |i| assert!(i != 5, "block 5")));
        assert!(caught.is_err());
        assert_eq!(map_blocks(3, 4, |i| i), [0, 1, 2]);
    }
}
