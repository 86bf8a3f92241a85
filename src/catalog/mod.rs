//! From a dataset to a bundle, and from a bundle to the generation that serves.

pub mod array;
pub mod generation;
pub mod text;
