//! Arrays that live in a bundle's memory map or on the heap, alike to their readers.

use std::ops::Deref;
use std::sync::Arc;

use bytemuck::Pod;
use memmap2::{Mmap, MmapMut};

use crate::memory::prefer_large_pages;

/// A shared, immutable array.
pub struct Array<T: Pod>(Inner<T>);

enum Inner<T> {
    Owned(Arc<[T]>),
    Mapped { map: Arc<Mmap>, offset: usize, len: usize },
}

impl<T: Pod> Array<T> {
    /// The `len` elements at byte `offset` of `map`; `None` where they do not fit or are not aligned.
    pub fn mapped(map: Arc<Mmap>, offset: usize, len: usize) -> Option<Self> {
        let end = len.checked_mul(size_of::<T>())?.checked_add(offset)?;
        bytemuck::try_cast_slice::<u8, T>(map.get(offset..end)?).ok()?;
        Some(Array(Inner::Mapped { map, offset, len }))
    }
}

/// Bytes from which huge pages matter: fewer fit the address caches of the CPU anyway.
const WORTH_HUGE: usize = 4 << 20;

impl<T: Pod> Array<T> {
    /// A copy in memory of huge pages, where the system has some, for arrays that are large and read at random; else itself.
    pub fn huge(self) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(&self);
        if bytes.len() < WORTH_HUGE {
            return self;
        }
        let Ok(mut map) = MmapMut::map_anon(bytes.len()) else { return self };
        prefer_large_pages(&mut map[..]);
        map.copy_from_slice(bytes);
        let len = self.len();
        map.make_read_only().ok().and_then(|map| Self::mapped(Arc::new(map), 0, len)).unwrap_or(self)
    }
}

impl<T: Pod> Deref for Array<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        match &self.0 {
            Inner::Owned(values) => values,
            Inner::Mapped { map, offset, len } => bytemuck::cast_slice(&map[*offset..*offset + len * size_of::<T>()]),
        }
    }
}

impl<T: Pod> From<Vec<T>> for Array<T> {
    fn from(values: Vec<T>) -> Self {
        Array(Inner::Owned(values.into()))
    }
}

impl<T: Pod> Default for Array<T> {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl<T: Pod> Clone for Array<T> {
    fn clone(&self) -> Self {
        Array(match &self.0 {
            Inner::Owned(values) => Inner::Owned(values.clone()),
            Inner::Mapped { map, offset, len } => Inner::Mapped { map: map.clone(), offset: *offset, len: *len },
        })
    }
}

impl<T: Pod> std::fmt::Debug for Array<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Array<{}>[{}]", std::any::type_name::<T>(), self.len())
    }
}
