//! The threads of the host program: those of its OpenMP library, which wait for work actively for a while.
//!
//! Two pools on the same cores disturb each other: the threads of one still wait for work when the other has some. And
//! to wake a thread of ours takes longer than a small kernel. So kernels that a program with an OpenMP library calls
//! between its own operations run on that library's threads.

use crate::parts::Counter;
use std::any::Any;
use std::cell::Cell;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

/// `GOMP_parallel`, the entry of a parallel region in code that GCC compiles: the body, its data, the number of
/// threads, flags. Libraries of other compilers have it too.
type GompParallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// The OpenMP library of a process.
#[derive(Clone, Copy)]
pub(crate) struct Team {
    parallel: GompParallel,
    process: u32,
}

static TEAM: OnceLock<Team> = OnceLock::new();

thread_local! {
    /// Whether this thread calls a kernel that may run on the team.
    static CALLS: Cell<bool> = const { Cell::new(false) };
}

/// Makes the OpenMP library of the host program known. Only the first call has an effect.
///
/// # Safety
///
/// `parallel` is the address of `GOMP_parallel` of a library that stays loaded.
pub unsafe fn set_openmp(parallel: *const c_void) {
    // SAFETY: as the caller promises.
    let parallel = unsafe { std::mem::transmute::<*const c_void, GompParallel>(parallel) };
    TEAM.get_or_init(|| Team { parallel, process: std::process::id() });
}

/// Runs `kernel`, whose blocks may run on the threads of the OpenMP library if there is one.
pub fn on_team<R>(kernel: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            CALLS.set(self.0);
        }
    }
    let _restore = Restore(CALLS.replace(true));
    kernel()
}

/// The OpenMP library of this process. A child of `fork` has none of its parent's threads, and its library would wait
/// for them.
fn openmp() -> Option<Team> {
    TEAM.get().copied().filter(|team| team.process == std::process::id())
}

/// Whether this process has an OpenMP library that kernels may use.
#[must_use]
pub fn has_openmp() -> bool {
    openmp().is_some()
}

/// The team of the running kernel, if it may use one.
pub(crate) fn team() -> Option<Team> {
    if CALLS.get() { openmp() } else { None }
}

struct Job<'a> {
    work: &'a (dyn Fn(bool) + Sync),
    counter: &'a Counter,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

extern "C" fn body(data: *mut c_void) {
    // SAFETY: `Team::run` has given the address of a job, and returns after all threads have left this function.
    let job = unsafe { &*data.cast::<Job>() };
    // Only the calling thread is in a call: the library's own have no such mark.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.work)(CALLS.get()))) {
        job.counter.stop();
        job.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
}

impl Team {
    /// Calls `work` on every thread of a team of this size, with true on the calling one. A panic reaches the caller.
    ///
    /// The size should be that of the program's own regions: the library ends threads that a smaller team has not, and
    /// starts new ones for a larger team.
    pub(crate) fn run(self, threads: usize, counter: &Counter, work: &(dyn Fn(bool) + Sync)) {
        let job = Job { work, counter, panic: Mutex::new(None) };
        let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
        // SAFETY: the job outlives the region, and `body` takes its address. No panic leaves `body`.
        unsafe { (self.parallel)(body, (&raw const job).cast_mut().cast(), threads, 0) };
        if let Some(panic) = job.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// `GOMP_parallel` by threads of the standard library.
    unsafe extern "C" fn parallel(
        body: extern "C" fn(*mut c_void),
        data: *mut c_void,
        threads: c_uint,
        _: c_uint,
    ) {
        let address = data as usize;
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(move || body(address as *mut c_void));
            }
            body(data);
        });
    }

    fn team_of(process: u32) -> Team {
        Team { parallel, process }
    }

    #[test]
    fn every_thread_of_a_team_works_and_knows_whether_it_called() {
        let (callers, others) = (AtomicUsize::new(0), AtomicUsize::new(0));
        on_team(|| {
            team_of(0).run(4, &Counter::new(0), &|calling| {
                let of = if calling { &callers } else { &others };
                of.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!((callers.into_inner(), others.into_inner()), (1, 3));
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_ends_the_work() {
        for panics_in_caller in [true, false] {
            let counter = Counter::new(1000);
            let caught = catch_unwind(AssertUnwindSafe(|| {
                on_team(|| {
                    team_of(0).run(3, &counter, &|calling| {
                        assert!(calling != panics_in_caller, "a block failed");
                    });
                });
            }));
            let message = *caught.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!(message, "a block failed");
            assert_eq!(counter.next(), None);
            assert!(!CALLS.get());
        }
    }

    #[test]
    fn only_a_marked_kernel_of_the_process_that_has_the_library_gets_a_team() {
        // SAFETY: `parallel` is a function of this program.
        unsafe { set_openmp(parallel as *const c_void) };
        assert!(team().is_none());
        assert!(on_team(team).is_some());
        assert!(has_openmp());
    }
}
