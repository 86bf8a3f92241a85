//! Follows what changes of items in the store.
