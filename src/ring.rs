//! A bounded queue to threads that wait for work. Lock-free; an idle thread parks and is woken by [`Ring::kick`].

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::Thread;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

/// Jobs on their way to workers.
#[derive(Debug)]
pub struct Ring<T> {
    jobs: ArrayQueue<T>,
    workers: Vec<Parking>,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Parking {
    thread: OnceLock<Thread>,
    asleep: AtomicBool,
}

impl<T> Ring<T> {
    /// A queue of `capacity` jobs for `n_workers` workers.
    pub fn new(capacity: usize, n_workers: usize) -> Self {
        Ring {
            jobs: ArrayQueue::new(capacity.max(1)),
            workers: (0..n_workers).map(|_| Parking::default()).collect(),
            closed: AtomicBool::new(false),
        }
    }

    /// Queues a job; call [`Self::kick`] after a batch of these.
    ///
    /// # Errors
    /// Gives the job back when the queue is full.
    pub fn push(&self, job: T) -> Result<(), T> {
        self.jobs.push(job)
    }

    /// Queues a job and wakes who sleeps.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn send(&self, job: T) -> Result<(), T> {
        self.push(job)?;
        self.kick();
        Ok(())
    }

    /// Wakes as many sleeping workers as there are jobs, at most.
    pub fn kick(&self) {
        // Pairs with the fence in `pop`: either this sees `asleep`, or that worker sees the jobs pushed before.
        fence(Ordering::SeqCst);
        let mut jobs = self.jobs.len();
        for worker in &self.workers {
            if jobs == 0 {
                break;
            }
            if worker.asleep.load(Ordering::Relaxed) && worker.asleep.swap(false, Ordering::AcqRel) {
                jobs -= 1;
                if let Some(thread) = worker.thread.get() {
                    thread.unpark();
                }
            }
        }
    }

    /// The next job, if there is one.
    pub fn try_pop(&self) -> Option<T> {
        self.jobs.pop()
    }

    /// Waits for the next job; `None` once the queue is closed and empty. `worker` belongs to the calling thread alone.
    pub fn pop(&self, worker: usize) -> Option<T> {
        loop {
            match self.jobs.pop() {
                None if self.closed() => return self.jobs.pop(),
                None => self.wait(worker, None),
                job => return job,
            }
        }
    }

    /// Sleeps until there is a job, the queue is closed, or the time is over; may end earlier. `worker` as in [`Self::pop`].
    pub fn wait(&self, worker: usize, at_most: Option<Duration>) {
        let parking = &self.workers[worker];
        parking.thread.get_or_init(std::thread::current);
        parking.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.jobs.is_empty() && !self.closed() {
            match at_most {
                Some(time) => std::thread::park_timeout(time),
                None => std::thread::park(),
            }
        }
        parking.asleep.store(false, Ordering::Relaxed);
    }

    /// Whether [`Self::close`] was called.
    pub fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Jobs waiting.
    pub fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether none wait.
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Lets workers finish what is queued and end.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        for worker in &self.workers {
            if let Some(thread) = worker.thread.get() {
                thread.unpark();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn no_job_and_no_wake_is_lost() {
        let queue = Arc::new(Ring::new(8, 2));
        let done = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..2)
            .map(|worker| {
                let (queue, done) = (queue.clone(), done.clone());
                std::thread::spawn(move || {
                    while queue.pop(worker).is_some() {
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        const JOBS: usize = 50_000;
        for n in 0..JOBS {
            let mut job = Box::new(n);
            while let Err(back) = queue.push(job) {
                job = back;
                queue.kick();
                std::thread::yield_now();
            }
            queue.kick();
            // Now and then let the workers run dry, so that they park.
            if n % 1000 == 0 {
                while done.load(Ordering::Relaxed) < n {
                    std::thread::yield_now();
                }
            }
        }
        queue.close();
        workers.into_iter().for_each(|w| w.join().unwrap());
        assert_eq!(done.load(Ordering::Relaxed), JOBS);
    }
}
