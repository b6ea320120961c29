//! Models of what threads share, for loom: it runs each in every order of the threads' steps, and with every value that
//! an atomic number can have there.

use crate::job::Job;
use crate::parts::{Counter, OfProcess};
use loom::cell::UnsafeCell;
use loom::model;
use loom::sync::Arc;
use loom::thread::spawn;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Numbers of which each is written by one thread at a time: loom refuses an access that another one may overlap.
struct Cells(Vec<UnsafeCell<usize>>);

// SAFETY: loom watches every access.
unsafe impl Sync for Cells {}
// SAFETY: as above.
unsafe impl Send for Cells {}

impl Cells {
    fn new(count: usize) -> Self {
        Self((0..count).map(|_| UnsafeCell::new(0)).collect())
    }

    fn add(&self, i: usize) {
        // SAFETY: loom watches the access.
        self.0[i].with_mut(|x| unsafe { *x += 1 });
    }

    fn read(&self) -> Vec<usize> {
        // SAFETY: loom watches the access.
        self.0.iter().map(|cell| cell.with(|x| unsafe { *x })).collect()
    }
}

#[test]
fn a_counter_gives_each_number_to_one_thread() {
    model(|| {
        let shared = Arc::new((Counter::new(3), Cells::new(3)));
        let work = |shared: &(Counter, Cells)| {
            while let Some(i) = shared.0.next() {
                shared.1.add(i);
            }
        };
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                spawn(move || work(&shared))
            })
            .collect();
        work(&shared);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(shared.1.read(), [1; 3]);
    });
}

#[test]
fn after_a_stop_a_counter_gives_no_number_again() {
    model(|| {
        let shared = Arc::new((Counter::new(3), Cells::new(3)));
        let other = Arc::clone(&shared);
        let thread = spawn(move || {
            while let Some(i) = other.0.next() {
                other.1.add(i);
            }
        });
        if let Some(i) = shared.0.next() {
            shared.1.add(i);
        }
        shared.0.stop();
        assert_eq!(shared.0.next(), None);
        thread.join().unwrap();
        assert!(shared.1.read().iter().all(|&count| count <= 1));
    });
}

#[test]
fn a_job_ends_when_each_part_ran_once_and_nobody_uses_its_memory_then() {
    for helpers in [1, 2] {
        model(move || {
            let cells = Cells::new(2);
            let mut threads = Vec::new();
            Job::run(2, &|i| cells.add(i), |job| {
                for _ in 0..helpers {
                    let job = Arc::clone(job);
                    threads.push(spawn(move || job.help()));
                }
            });
            // Not yet joined: a helper may still run, or start, and must leave the numbers alone.
            assert_eq!(cells.read(), [1; 2]);
            (0..2).for_each(|i| cells.add(i));
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}

#[test]
fn nobody_waits_for_a_helper_that_has_not_started() {
    model(|| {
        let (cells, mut late) = (Cells::new(2), None);
        Job::run(2, &|i| cells.add(i), |job| late = Some(Arc::clone(job)));
        assert_eq!(cells.read(), [1; 2]);
        let late = late.unwrap();
        spawn(move || late.help()).join().unwrap();
        assert_eq!(cells.read(), [1; 2]);
    });
}

#[test]
fn a_panic_of_a_part_reaches_the_caller_after_all_have_ended() {
    model(|| {
        let cells = Cells::new(2);
        let mut thread = None;
        let part = |i| {
            cells.add(i);
            if i == 0 {
                resume_unwind(Box::new("part 0"));
            }
        };
        let caught = catch_unwind(AssertUnwindSafe(|| {
            Job::run(2, &part, |job| {
                let job = Arc::clone(job);
                thread = Some(spawn(move || job.help()));
            });
        }));
        assert_eq!(caught.unwrap_err().downcast_ref(), Some(&"part 0"));
        assert_eq!(cells.read(), [1; 2]);
        thread.unwrap().join().unwrap();
    });
}

#[test]
fn threads_that_ask_at_once_get_one_value_and_a_child_of_fork_its_own() {
    model(|| {
        // Not freed, as the static of the kernels is not.
        let slot: &'static OfProcess<Cells> = Box::leak(Box::new(OfProcess::new()));
        let make = || {
            let cells = Cells::new(1);
            cells.add(0);
            Some(cells)
        };
        let get = move |process| slot.get(process, make).unwrap();
        let other = spawn(move || {
            let value = get(1);
            // Made before it was published: loom would refuse the read otherwise.
            assert_eq!(value.read(), [1]);
            std::ptr::from_ref(value).addr()
        });
        let value = get(1);
        assert_eq!(value.read(), [1]);
        assert_eq!(other.join().unwrap(), std::ptr::from_ref(value).addr());
        let child = get(2);
        assert!(!std::ptr::eq(value, child));
        assert_eq!((value.read(), child.read()), (vec![1], vec![1]));
        assert!(std::ptr::eq(child, get(2)));
        assert!(slot.get(3, || None).is_none());
    });
}
