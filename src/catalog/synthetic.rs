//! A synthetic catalogue for the demo and for tests.
