//! How long a stream takes for each thing that it is given: an event behind every kernel and every copy, while somebody asks.
#![allow(unsafe_code)] // Events of the driver, through cudarc.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::context::Context;
use crate::device::DeviceError;

/// Events of one stream, in its order.
#[derive(Debug)]
pub(super) struct Timeline {
    context: Arc<Context>,
    /// What lies between an event and the one before it; the first has nothing before it.
    events: Vec<(&'static str, sys::CUevent)>,
}

// SAFETY: the driver takes events from any thread; a timeline is one thread's at a time.
unsafe impl Send for Timeline {}

impl Timeline {
    /// Without an event.
    pub fn new(context: Arc<Context>) -> Self {
        Timeline { context, events: Vec::new() }
    }

    /// Gives `stream`, which lives and records nothing, an event behind what it was given last.
    ///
    /// # Errors
    /// What the driver says.
    pub fn lap(&mut self, what: &'static str, stream: sys::CUstream) -> Result<(), DeviceError> {
        self.context.bind()?;
        let made = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.context.check("cuEventCreate", made)?;
        self.events.push((what, event));
        // SAFETY: the event was just made, and is destroyed when this is dropped; the caller vouches for the stream.
        let recorded = unsafe { result::event::record(event, stream) };
        self.context.check("cuEventRecord", recorded)
    }

    /// Waits for the last event; what was given, and seconds from the event before it to its own.
    ///
    /// # Errors
    /// What the GPU failed at.
    pub fn times(&self) -> Result<Vec<(&'static str, f64)>, DeviceError> {
        let Some((_, last)) = self.events.last() else { return Ok(Vec::new()) };
        self.context.bind()?;
        // SAFETY: events live as long as this.
        let waited = unsafe { result::event::synchronize(*last) };
        self.context.check("waiting for the GPU", waited)?;
        let pairs = self.events.windows(2);
        pairs
            .map(|pair| {
                // SAFETY: both were recorded on one stream, which has passed the last of all.
                let spent = unsafe { result::event::elapsed(pair[0].1, pair[1].1) };
                Ok((pair[1].0, f64::from(self.context.check("cuEventElapsedTime", spent)?) / 1e3))
            })
            .collect()
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        self.context.bind_anyway();
        for (_, event) in self.events.drain(..) {
            // SAFETY: made by `lap`, destroyed once; a driver keeps what a stream is still to reach.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}
