//! The error that leaves the server: what happened, whose fault it is, whether trying again can help.

use std::borrow::Cow;

/// What went wrong, with its HTTP status and wire code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Code {
    /// Malformed or out of range.
    BadRequest = 400,
    /// The call needs a token, and this is not it.
    Unauthorized = 401,
    /// No such item, ranker or path.
    NotFound = 404,
    /// The path exists, the verb does not.
    MethodNotAllowed = 405,
    /// The deadline passed before an answer was ready.
    DeadlineExceeded = 408,
    /// Larger than a limit allows.
    TooLarge = 413,
    /// Shed: the server is at its limits now.
    Overloaded = 429,
    /// A defect of ours; the log has the details.
    Internal = 500,
    /// Starting, draining, or a needed part is down.
    Unavailable = 503,
}

impl Code {
    /// The HTTP status.
    pub fn status(self) -> u16 {
        self as u16
    }

    /// The name in error bodies and metric labels.
    pub fn name(self) -> &'static str {
        match self {
            Code::BadRequest => "bad_request",
            Code::Unauthorized => "unauthorized",
            Code::NotFound => "not_found",
            Code::MethodNotAllowed => "method_not_allowed",
            Code::DeadlineExceeded => "deadline_exceeded",
            Code::TooLarge => "too_large",
            Code::Overloaded => "overloaded",
            Code::Internal => "internal",
            Code::Unavailable => "unavailable",
        }
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        matches!(self, Code::DeadlineExceeded | Code::Overloaded | Code::Unavailable)
    }
}

/// An answer that is an error. The message is for the client: it names what the client sent, never our insides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What went wrong.
    pub code: Code,
    /// For a person; static on the hot path.
    pub message: Cow<'static, str>,
}

impl Error {
    /// An error with a fixed message.
    pub const fn fixed(code: Code, message: &'static str) -> Self {
        Error { code, message: Cow::Borrowed(message) }
    }

    /// An error whose message quotes the client's input. Not for the hot path.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error { code, message: Cow::Owned(message.into()) }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.message)
    }
}

impl std::error::Error for Error {}
