//! A job that a thread shares with helpers that may come late, or not at all.

use crate::parts::Counter;
#[cfg(loom)]
use loom::{
    sync::atomic::{AtomicUsize, Ordering},
    sync::{Arc, Mutex},
    thread::yield_now,
};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::PoisonError;
#[cfg(not(loom))]
use std::{
    sync::atomic::{AtomicUsize, Ordering},
    sync::{Arc, Mutex},
    thread::yield_now,
};

/// A job whose parts the calling thread and its helpers take from one counter.
///
/// The caller waits only for parts that a helper has begun, and never for a helper that has not started, so that a busy
/// pool, or a pool of one thread, does not delay it. A helper that starts after the end of the job finds no part left,
/// and does not use the caller's memory.
pub(crate) struct Job {
    counter: Counter,
    finished: AtomicUsize,
    /// A closure of the caller, which keeps it alive until every part that was begun is finished.
    part: *const (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `part` may be called from any thread, and is called only for a part that exists, so while the caller waits.
unsafe impl Send for Job {}
// SAFETY: as above.
unsafe impl Sync for Job {}

impl Job {
    /// Calls `part(i)` once for every `i` below `parts`, on this thread and on those that call [`Job::help`]. `call`
    /// calls them: it may give the job to any number of threads. A panic of a part is passed on when all have ended.
    pub(crate) fn run(parts: usize, part: &(dyn Fn(usize) + Sync), call: impl FnOnce(&Arc<Self>)) {
        let job = Arc::new(Self {
            counter: Counter::new(parts),
            finished: AtomicUsize::new(0),
            // SAFETY: only the lifetime changes: the job calls it for parts alone, and all of them end below.
            part: unsafe {
                std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(part)
            },
            panic: Mutex::new(None),
        });
        call(&job);
        job.help();
        let mut looks = 0;
        while job.finished.load(Ordering::Acquire) < parts {
            looks += 1;
            if looks < 1000 && cfg!(not(loom)) { std::hint::spin_loop() } else { yield_now() }
        }
        let panic = job.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Works through parts until there are no more.
    pub(crate) fn help(&self) {
        while let Some(i) = self.counter.next() {
            // SAFETY: the caller waits for part `i`.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.part)(i) }));
            if let Err(panic) = outcome {
                *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
            self.finished.fetch_add(1, Ordering::Release);
        }
    }
}
