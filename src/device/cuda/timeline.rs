//! How long a stream takes for what it is given: events that tell times, and one behind every kernel and every copy, while somebody asks.
#![allow(unsafe_code)] // Events of the driver, through cudarc.

use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::context::Context;
use crate::device::DeviceError;

/// Events that tell times.
#[derive(Debug)]
pub(super) struct Events {
    context: Arc<Context>,
    events: Vec<sys::CUevent>,
}

// SAFETY: the driver takes events from any thread, several at once.
unsafe impl Send for Events {}
// SAFETY: as above.
unsafe impl Sync for Events {}

impl Events {
    /// None yet; `None`: the driver does not tell times.
    pub fn new(context: Arc<Context>) -> Option<Self> {
        context.tells_times().then(|| Events { context, events: Vec::new() })
    }

    /// Makes another one.
    ///
    /// # Errors
    /// What the driver says.
    pub fn add(&mut self) -> Result<sys::CUevent, DeviceError> {
        self.context.bind()?;
        let made = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.context.check("cuEventCreate", made)?;
        self.events.push(event);
        Ok(event)
    }

    /// Which lives as long as this.
    ///
    /// # Panics
    /// If there is no such event.
    pub fn get(&self, at: usize) -> sys::CUevent {
        self.events[at]
    }

    /// Between two of one stream, with this context current.
    ///
    /// # Errors
    /// What the driver says, where one has not come yet.
    ///
    /// # Panics
    /// If there is no such event.
    pub fn milliseconds(&self, from: usize, to: usize) -> Result<f32, DriverError> {
        // SAFETY: both live; the function is there, as `new` saw.
        unsafe { result::event::elapsed(self.events[from], self.events[to]) }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.context.bind_anyway();
        for event in self.events.drain(..) {
            // SAFETY: made by `add`, destroyed once; a driver keeps what a stream is still to reach.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

/// Events of one stream, in its order.
#[derive(Debug)]
pub(super) struct Timeline {
    events: Events,
    /// By event: what lies between it and the one before it; the first has nothing before it.
    laps: Vec<&'static str>,
}

impl Timeline {
    /// Without an event; `None`: the driver does not tell times.
    pub fn new(context: Arc<Context>) -> Option<Self> {
        Some(Timeline { events: Events::new(context)?, laps: Vec::new() })
    }

    /// Gives `stream`, which lives and records nothing, an event behind what it was given last.
    ///
    /// # Errors
    /// What the driver says.
    pub fn lap(&mut self, what: &'static str, stream: sys::CUstream) -> Result<(), DeviceError> {
        let event = self.events.add()?;
        self.laps.push(what);
        // SAFETY: the event lives; the caller vouches for the stream.
        let recorded = unsafe { result::event::record(event, stream) };
        self.events.context.check("cuEventRecord", recorded)
    }

    /// Waits for the last event; what was given, and seconds from the event before it to its own.
    ///
    /// # Errors
    /// What the GPU failed at.
    pub fn times(&self) -> Result<Vec<(&'static str, f64)>, DeviceError> {
        let Some(last) = self.laps.len().checked_sub(1) else { return Ok(Vec::new()) };
        let context = &self.events.context;
        context.bind()?;
        // SAFETY: the event lives.
        let waited = unsafe { result::event::synchronize(self.events.get(last)) };
        context.check("waiting for the GPU", waited)?;
        (1..=last)
            .map(|at| {
                let spent = context.check("cuEventElapsedTime", self.events.milliseconds(at - 1, at))?;
                Ok((self.laps[at], f64::from(spent) / 1e3))
            })
            .collect()
    }
}
