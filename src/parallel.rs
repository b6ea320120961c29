//! The thread pool: private, built at the first large call, and built anew in a forked child.
//!
//! Work is cut into blocks whose bounds depend on the sizes alone, never on the number of threads. A sum `sum_b s_b` is
//! taken of the blocks' sums `s_b` in the order of the blocks, so that results are the same, bit for bit, for any number of
//! threads.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::thread::available_parallelism;

struct Pool {
    process: u32,
    threads: ThreadPool,
}

static POOL: AtomicPtr<Pool> = AtomicPtr::new(std::ptr::null_mut());

/// The pool of this process. A child of `fork` inherits the address of its parent's pool but none of its threads, so
/// it builds its own and leaves the inherited one alone. `None` if the system gives no threads.
fn pool() -> Option<&'static ThreadPool> {
    let process = std::process::id();
    loop {
        let current = POOL.load(Ordering::Acquire);
        // SAFETY: a pool, once published, is never freed.
        if let Some(pool) = unsafe { current.as_ref() }
            && pool.process == process
        {
            return Some(&pool.threads);
        }
        let threads = ThreadPoolBuilder::new()
            .num_threads(available_parallelism().map_or(1, usize::from))
            .thread_name(|i| format!("rgd-{i}"))
            .build()
            .ok()?;
        let new = Box::into_raw(Box::new(Pool { process, threads }));
        if POOL.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: another thread published its pool first, so this one is still ours alone.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

/// Calls `block(i)` once for every `i` below `blocks`, on at most `threads` threads, the calling one among them.
pub fn for_each_block(blocks: usize, threads: usize, block: impl Fn(usize) + Sync) {
    let workers = threads.min(blocks);
    let pool = if workers > 1 { pool() } else { None };
    let Some(pool) = pool else {
        (0..blocks).for_each(block);
        return;
    };
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= blocks {
                break;
            }
            block(i);
        }
    };
    pool.in_place_scope(|scope| {
        for _ in 1..workers {
            scope.spawn(|_| work());
        }
        work();
    });
}

/// `block(i)` for every `i` below `blocks`, in the order of `i`.
pub fn map_blocks<R: Send + Clone + Default>(
    blocks: usize,
    threads: usize,
    block: impl Fn(usize) -> R + Sync,
) -> Vec<R> {
    let mut results = vec![R::default(); blocks];
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
    fn a_panic_in_a_block_reaches_the_caller_and_leaves_the_pool_usable() {
        let caught = std::panic::catch_unwind(|| for_each_block(8, 4, |i| assert!(i != 5, "block 5")));
        assert!(caught.is_err());
        assert_eq!(map_blocks(3, 4, |i| i), [0, 1, 2]);
    }
}
