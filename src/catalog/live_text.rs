//! Words of items that came or changed, beside the bundle's text index.
//!
//! Immutable segments of inverted lists, merged when the newer one has grown to half of the older: a change copies few of them. What they
//! find is scored by the bundle's statistics, as a document of the bundle would be.

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Fields of a document: words, and trigrams.
pub const FIELDS: usize = 2;

/// What is searched of an item.
#[derive(Debug, Default, PartialEq)]
pub struct LiveText {
    /// Hash of field and token, and how often it occurs; each once.
    pub terms: Vec<(u64, u32)>,
    /// Tokens by field.
    pub lengths: [u32; FIELDS],
}

impl LiveText {
    /// Of the tokens of each field, in any order.
    pub fn new(tokens: [Vec<String>; FIELDS]) -> Self {
        let mut counts: HashMap<u64, u32> = HashMap::new();
        for (field, tokens) in tokens.iter().enumerate() {
            tokens.iter().for_each(|token| *counts.entry(term(field, token)).or_default() += 1);
        }
        LiveText { terms: counts.into_iter().collect(), lengths: tokens.map(|tokens| tokens.len() as u32) }
    }

    /// Memory, bytes.
    pub fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&self.terms[..])
    }
}

/// Names a token of a field.
pub fn term(field: usize, token: &str) -> u64 {
    xxh3_64_with_seed(token.as_bytes(), field as u64)
}

/// Some documents and their inverted lists.
#[derive(Debug, Default)]
struct Segment {
    documents: Vec<(u32, Arc<LiveText>)>,
    /// Places of documents that have the term, and how often they do.
    lists: HashMap<u64, Vec<(u32, u32)>>,
}

impl Segment {
    fn new(documents: Vec<(u32, Arc<LiveText>)>) -> Self {
        let mut lists: HashMap<u64, Vec<(u32, u32)>> = HashMap::new();
        for (place, (_, text)) in documents.iter().enumerate() {
            text.terms.iter().for_each(|&(term, times)| lists.entry(term).or_default().push((place as u32, times)));
        }
        Segment { documents, lists }
    }
}

/// All texts that came.
#[derive(Clone, Debug, Default)]
pub struct LiveTexts(Vec<Arc<Segment>>);

impl LiveTexts {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds documents by row; `holds` says of older ones whether they are in force.
    pub fn add(&mut self, mut documents: Vec<(u32, Arc<LiveText>)>, holds: impl Fn(u32, &Arc<LiveText>) -> bool) {
        documents.retain(|(row, text)| holds(*row, text));
        while let Some(last) = self.0.last() {
            if last.documents.len() > 2 * documents.len() {
                break;
            }
            let older = last.documents.iter().filter(|(row, text)| holds(*row, text));
            documents.extend(older.cloned());
            self.0.pop();
        }
        if !documents.is_empty() {
            self.0.push(Arc::new(Segment::new(documents)));
        }
    }

    /// Hands over row, text, and what `score` gives for the times that it has each of `terms`, added up, of every document that has one
    /// of them. `score` gets the position of the term, the text, and the times.
    pub fn search(
        &self,
        terms: &[u64],
        score: impl Fn(usize, &LiveText, u32) -> f32,
        mut take: impl FnMut(u32, &Arc<LiveText>, f32),
    ) {
        let mut scores: HashMap<u32, f32> = HashMap::new();
        for segment in &self.0 {
            for (at, term) in terms.iter().enumerate() {
                for &(place, times) in segment.lists.get(term).into_iter().flatten() {
                    *scores.entry(place).or_default() += score(at, &segment.documents[place as usize].1, times);
                }
            }
            for (place, score) in scores.drain() {
                let (row, text) = &segment.documents[place as usize];
                take(*row, text, score);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_newest_text_of_every_row_is_found(
            batches in prop::collection::vec(prop::collection::btree_map(0u32..12, prop::collection::vec("[ab]{1,2}", 0..5), 1..5), 0..12),
            wanted in prop::collection::vec("[ab]{1,2}", 1..3),
        ) {
            let (mut texts, mut newest) = (LiveTexts::default(), HashMap::<u32, Arc<LiveText>>::new());
            let mut plain: HashMap<u32, Vec<String>> = HashMap::new();
            let mut n = 0;
            for batch in batches {
                let mut documents = Vec::new();
                for (row, tokens) in batch {
                    let text = Arc::new(LiveText::new([tokens.clone(), Vec::new()]));
                    prop_assert_eq!(text.lengths, [tokens.len() as u32, 0]);
                    newest.insert(row, text.clone());
                    plain.insert(row, tokens);
                    documents.push((row, text));
                    n += 1;
                }
                texts.add(documents, |row, text| Arc::ptr_eq(&newest[&row], text));
                prop_assert!(texts.0.len() <= 2 + (n as f64).log2() as usize);
            }
            let terms: Vec<u64> = wanted.iter().map(|token| term(0, token)).collect();
            let mut got: HashMap<u32, f32> = HashMap::new();
            texts.search(&terms, |_, _, times| times as f32, |row, text, score| {
                if Arc::ptr_eq(&newest[&row], text) {
                    assert!(got.insert(row, score).is_none());
                }
            });
            let count = |tokens: &[String]| {
                wanted.iter().map(|token| tokens.iter().filter(|t| *t == token).count()).sum::<usize>() as f32
            };
            let want: HashMap<u32, f32> =
                plain.into_iter().map(|(row, tokens)| (row, count(&tokens))).filter(|(_, n)| *n > 0.0).collect();
            prop_assert_eq!(got, want);
        }
    }
}
