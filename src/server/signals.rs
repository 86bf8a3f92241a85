//! SIGTERM and SIGINT, taken by a thread of their own.
#![allow(unsafe_code)] // sigwait and the signal mask.

use std::io;

/// Blocks SIGTERM and SIGINT for this thread and all that it starts; call before any other thread exists.
///
/// # Errors
/// The operating system refused.
pub fn block() -> io::Result<()> {
    // SAFETY: the set is initialised by sigemptyset before it is used.
    let failed = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut())
    };
    if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
}

/// Waits for the next SIGTERM or SIGINT; [`block`] must have been called. Returns its name.
pub fn wait() -> &'static str {
    let mut signal = 0;
    // SAFETY: as in `block`; sigwait writes the signal's number.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        while libc::sigwait(&set, &mut signal) != 0 {}
    }
    if signal == libc::SIGINT { "SIGINT" } else { "SIGTERM" }
}

/// Pins the calling thread to a CPU. Where that is not allowed it runs anywhere.
pub fn pin(cpu: usize) {
    // SAFETY: the set is zeroed and only this thread's affinity changes.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu % libc::CPU_SETSIZE as usize, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

/// Lets the calling thread wait for its turn (`SCHED_BATCH`): woken, it does not interrupt who runs on its CPU. A policy that the process
/// was given from outside stays.
pub fn take_turns() {
    // SAFETY: reads and changes the policy of the calling thread alone; that it may fail changes nothing else.
    unsafe {
        if libc::sched_getscheduler(0) == libc::SCHED_OTHER {
            let mut param: libc::sched_param = std::mem::zeroed();
            param.sched_priority = 0;
            libc::sched_setscheduler(0, libc::SCHED_BATCH, &param);
        }
    }
}

/// Lets every other thread go before the calling one, where the machine is busy.
pub fn give_way() {
    // SAFETY: changes a number of the calling thread alone; that it may fail changes nothing else.
    unsafe {
        libc::nice(19);
    }
}

/// The CPUs that this process may use.
pub fn allowed_cpus() -> Vec<usize> {
    // SAFETY: the set is zeroed and written by the call.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    // SAFETY: indices are below the set's size.
    let cpus: Vec<usize> =
        (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect();
    if cpus.is_empty() { vec![0] } else { cpus }
}

/// Raises the limit of open files to the most that this process may have: every connection is one.
pub fn raise_file_limit() {
    // SAFETY: both calls read or write one struct that lives on this stack. Where they fail, the limit stays as it is.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// Keeps large freed blocks in the process: rankers allocate and free tensors at every request, and giving each back to
/// the kernel costs up to 1.7 times the inference.
pub fn keep_freed_memory() {
    // SAFETY: plain calls into the allocator's tuning.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
    }
}
