//! Names that are given numbers while others read them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

/// Names of the first chunk; each further one has twice as many.
const FIRST: usize = 64;
const CHUNKS: usize = 26;

type Chunk = Box<[OnceLock<Arc<str>>]>;

/// Names in the order in which they came; a number never changes its name. Reading a name takes no lock.
#[derive(Default)]
pub struct Names {
    chunks: [OnceLock<Chunk>; CHUNKS],
    len: AtomicU32,
    numbers: RwLock<HashMap<Arc<str>, u32>>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Names[{}]", self.len())
    }
}

/// Chunk and place therein.
fn place(number: u32) -> (usize, usize) {
    let at = number as usize + FIRST;
    let chunk = (at / FIRST).ilog2();
    (chunk as usize, at - (FIRST << chunk))
}

impl Names {
    /// How many there are.
    pub fn len(&self) -> u32 {
        self.len.load(Acquire)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The name of a number.
    pub fn get(&self, number: u32) -> Option<&str> {
        let (chunk, at) = place(number);
        self.chunks.get(chunk)?.get()?.get(at)?.get().map(|name| &**name)
    }

    /// The number of a name.
    pub fn number(&self, name: &str) -> Option<u32> {
        if self.is_empty() { None } else { self.numbers.read().get(name).copied() }
    }

    /// The number of a name, which is given one if it has none; `None` beyond some four billion.
    pub fn give(&self, name: &str) -> Option<u32> {
        let mut numbers = self.numbers.write();
        if let Some(&number) = numbers.get(name) {
            return Some(number);
        }
        let number = self.len();
        let (chunk, at) = place(number);
        let chunk = self.chunks.get(chunk)?.get_or_init(|| (0..FIRST << chunk).map(|_| OnceLock::new()).collect());
        let name: Arc<str> = name.into();
        chunk[at].get_or_init(|| name.clone());
        numbers.insert(name, number);
        self.len.store(number + 1, Release);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_keep_their_numbers() {
        let names = Names::default();
        for at in 0..1000u32 {
            assert_eq!(names.give(&format!("n{at}")), Some(at));
            assert_eq!(names.give(&format!("n{}", at / 2)), Some(at / 2));
        }
        assert_eq!(names.len(), 1000);
        for at in 0..1000 {
            assert_eq!(names.get(at), Some(&*format!("n{at}")));
            assert_eq!(names.number(&format!("n{at}")), Some(at));
        }
        assert_eq!((names.get(1000), names.get(u32::MAX), names.number("x")), (None, None, None));
    }

    #[test]
    fn readers_see_whole_names() {
        let names = Names::default();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while names.len() < 5000 {
                        let n = names.len();
                        (0..n).step_by(97).for_each(|at| assert_eq!(names.get(at), Some(&*at.to_string())));
                    }
                });
            }
            (0..5000).for_each(|at| assert_eq!(names.give(&at.to_string()), Some(at)));
        });
    }
}
