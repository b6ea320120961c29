//! XLA's own thread pool, through its foreign function interface.
//!
//! The calling thread works through the parts of a [`Job`], and so do tasks in XLA's pool.

use super::xla_api::{Api, ErrorDestroyArgs, NumThreadsArgs, ScheduleArgs, XlaError};
use crate::job::Job;
use std::ffi::c_void;
use std::mem::offset_of;
use std::ptr::null_mut;
use std::sync::Arc;

/// The pool of a call that is under way.
#[derive(Clone, Copy)]
pub(super) struct Pool<'a> {
    api: Option<&'a Api>,
    context: *mut c_void,
}

/// # Safety
/// `data` is an `Arc<Job>` that was given away.
unsafe extern "C" fn task(data: *mut c_void) {
    // SAFETY: what the caller promises.
    let job = unsafe { Arc::from_raw(data.cast::<Job>()) };
    job.help();
}

impl Pool<'_> {
    /// # Safety
    /// `api` is null or XLA's table, of the size that it states, and `context` that of a call that lasts for `'a`.
    pub(super) unsafe fn new(api: *const Api, context: *mut c_void) -> Self {
        // SAFETY: what the caller promises. The head of the table says how much of it there is.
        let whole = !api.is_null()
            && unsafe { (&raw const (*api).struct_size).read() }
                >= offset_of!(Api, num_threads) + size_of::<usize>();
        // SAFETY: as above.
        Self { api: if whole { unsafe { api.as_ref() } } else { None }, context }
    }

    /// The number of threads of the pool; 1 if there is no pool.
    fn threads(self) -> usize {
        let Some(num_threads) = self.api.and_then(|api| api.num_threads) else { return 1 };
        let mut count = 1;
        let mut args = NumThreadsArgs {
            struct_size: size_of::<NumThreadsArgs>(),
            extensions: null_mut(),
            context: self.context,
            num_threads: &raw mut count,
        };
        // SAFETY: arguments as XLA lays them out.
        if unsafe { self.succeeded(num_threads(&raw mut args)) } {
            usize::try_from(count).unwrap_or(1).max(1)
        } else {
            1
        }
    }

    /// Whether there is no error. An error is freed.
    unsafe fn succeeded(self, error: *mut XlaError) -> bool {
        if error.is_null() {
            return true;
        }
        if let Some(destroy) = self.api.and_then(|api| api.error_destroy) {
            let mut args = ErrorDestroyArgs {
                struct_size: size_of::<ErrorDestroyArgs>(),
                extensions: null_mut(),
                error,
            };
            // SAFETY: the error is XLA's and ours to free.
            unsafe { destroy(&raw mut args) };
        }
        false
    }

    /// Calls `part(i)` once for every `i` below `parts`, on this thread and on those of the pool.
    pub(super) fn for_each(self, parts: usize, part: &(dyn Fn(usize) + Sync)) {
        let helpers = if parts > 1 { self.threads().min(parts) - 1 } else { 0 };
        let Some(schedule) = self.api.and_then(|api| api.schedule).filter(|_| helpers > 0) else {
            (0..parts).for_each(part);
            return;
        };
        Job::run(parts, part, |job| {
            for _ in 0..helpers {
                let data = Arc::into_raw(Arc::clone(job));
                let mut args = ScheduleArgs {
                    struct_size: size_of::<ScheduleArgs>(),
                    extensions: null_mut(),
                    context: self.context,
                    task,
                    data: data.cast_mut().cast(),
                };
                // SAFETY: arguments as XLA lays them out; it runs the task once, or returns an error.
                if unsafe { !self.succeeded(schedule(&raw mut args)) } {
                    // SAFETY: the task, which would have taken it, does not run.
                    drop(unsafe { Arc::from_raw(data) });
                    break;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    /// Tables of functions as XLA's, of a pool that runs tasks in one way or another.
    fn api(
        schedule: unsafe extern "C" fn(*mut ScheduleArgs) -> *mut XlaError,
        num_threads: unsafe extern "C" fn(*mut NumThreadsArgs) -> *mut XlaError,
    ) -> Api {
        Api { schedule: Some(schedule), num_threads: Some(num_threads), ..Api::empty() }
    }

    unsafe extern "C" fn four(args: *mut NumThreadsArgs) -> *mut XlaError {
        // SAFETY: arguments of `threads`.
        unsafe { *(*args).num_threads = 4 };
        null_mut()
    }

    unsafe extern "C" fn on_a_thread(args: *mut ScheduleArgs) -> *mut XlaError {
        // SAFETY: arguments of `for_each`.
        let (task, data) = unsafe { ((*args).task, (*args).data as usize) };
        // SAFETY: as XLA does.
        std::thread::spawn(move || unsafe { task(data as *mut c_void) });
        null_mut()
    }

    unsafe extern "C" fn at_once(args: *mut ScheduleArgs) -> *mut XlaError {
        // SAFETY: arguments of `for_each`.
        unsafe { ((*args).task)((*args).data) };
        null_mut()
    }

    unsafe extern "C" fn late(args: *mut ScheduleArgs) -> *mut XlaError {
        // SAFETY: arguments of `for_each`.
        let (task, data) = unsafe { ((*args).task, (*args).data as usize) };
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            // SAFETY: as XLA does.
            unsafe { task(data as *mut c_void) };
        });
        null_mut()
    }

    unsafe extern "C" fn refused(_: *mut ScheduleArgs) -> *mut XlaError {
        std::ptr::dangling_mut::<u64>().cast()
    }

    fn counts(api: *const Api, parts: usize) -> Vec<usize> {
        let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
        // SAFETY: a table of this test.
        let pool = unsafe { Pool::new(api, null_mut()) };
        pool.for_each(parts, &|i| {
            counts[i].fetch_add(1, Ordering::Relaxed);
        });
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_part_runs_once_however_the_pool_runs_its_tasks() {
        assert_eq!(counts(std::ptr::null(), 5), vec![1; 5]);
        for schedule in [on_a_thread, at_once, late, refused] {
            let api = api(schedule, four);
            for parts in [0, 1, 2, 100] {
                assert_eq!(counts(&raw const api, parts), vec![1; parts]);
            }
        }
    }

    #[test]
    fn nobody_waits_for_a_task_that_has_not_started() {
        let (api, start) = (api(late, four), std::time::Instant::now());
        assert_eq!(counts(&raw const api, 10), vec![1; 10]);
        assert!(start.elapsed() < Duration::from_millis(90));
        // The late tasks find nothing to do.
        std::thread::sleep(Duration::from_millis(150));
    }

    #[test]
    fn a_table_of_an_older_interface_has_no_pool() {
        let api = Api { struct_size: offset_of!(Api, schedule), ..api(on_a_thread, four) };
        // SAFETY: a table of this test.
        assert_eq!(unsafe { Pool::new(&raw const api, null_mut()) }.threads(), 1);
        assert_eq!(counts(&raw const api, 3), vec![1; 3]);
    }

    #[test]
    fn a_panic_of_a_part_reaches_the_caller_after_all_have_ended() {
        let (api, run) = (api(on_a_thread, four), AtomicUsize::new(0));
        // SAFETY: a table of this test.
        let pool = unsafe { Pool::new(&raw const api, null_mut()) };
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.for_each(20, &|i| {
                run.fetch_add(1, Ordering::Relaxed);
                assert!(i != 3, "part 3");
            });
        }));
        assert!(caught.is_err());
        assert_eq!(run.into_inner(), 20);
    }
}
