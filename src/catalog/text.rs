//! Words to items: BM25 over words and over character trigrams, so that prefixes and typos find their item (tantivy).

use std::collections::HashMap;
use std::path::Path;

use tantivy::collector::TopDocs;
use tantivy::directory::MmapDirectory;
use tantivy::fieldnorm::FieldNormReader;
use tantivy::query::{Bm25Weight, BooleanQuery, BoostQuery, Occur, Query, TermQuery};
use tantivy::schema::{FAST, Field, INDEXED, IndexRecordOption, Schema, TextFieldIndexing, TextOptions};
use tantivy::tokenizer::{LowerCaser, NgramTokenizer, RemoveLongFilter, SimpleTokenizer, TextAnalyzer, TokenStream};
use tantivy::{Index, IndexReader, ReloadPolicy, TantivyDocument, Term};

use super::CatalogError;
use super::live::LiveItems;
use super::live_text::{self, LiveText};
use crate::candidates::{Scored, best_first};

/// A text index over chosen item columns.
pub struct TextIndex {
    reader: IndexReader,
    words: Field,
    grams: Field,
    word_analyzer: TextAnalyzer,
    gram_analyzer: TextAnalyzer,
}

impl std::fmt::Debug for TextIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TextIndex[{}]", self.reader.searcher().num_docs())
    }
}

const ROW: &str = "row";
const WORDS: &str = "words";
const GRAMS: &str = "grams";
/// Terms of one query that are looked up; a query is words a person typed.
const MAX_WORDS: usize = 16;
const MAX_GRAMS: usize = 64;
/// A whole word says more than the trigrams that it is made of.
const WORD_BOOST: f32 = 2.0;
/// The first column (a title, usually) counts this much more, by repetition at index time.
const FIRST_COLUMN_TIMES: usize = 2;

fn analyzers() -> (TextAnalyzer, TextAnalyzer) {
    let words =
        TextAnalyzer::builder(SimpleTokenizer::default()).filter(RemoveLongFilter::limit(64)).filter(LowerCaser);
    // The bounds are constants that the tokenizer accepts; were they not, trigram search would be off, words still on.
    let grams = match NgramTokenizer::new(3, 3, false) {
        Ok(grams) => TextAnalyzer::builder(grams).filter(LowerCaser).build(),
        Err(_) => TextAnalyzer::builder(SimpleTokenizer::default()).filter(LowerCaser).build(),
    };
    (words.build(), grams)
}

/// Text as the trigram field sees it: words with a blank on each side, so that starts and ends of words count.
fn padded(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push(' ');
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
        out.push_str(word);
        out.push(' ');
    }
    out
}

impl TextIndex {
    /// Indexes `texts` (per column, the text of every item) into `directory`, one segment.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn build(directory: &Path, texts: &[(String, Vec<String>)], n_items: usize) -> Result<(), CatalogError> {
        let wrong = |e: tantivy::TantivyError| CatalogError::file(directory, e.to_string());
        std::fs::create_dir_all(directory).map_err(|e| CatalogError::io(directory, e))?;
        let indexing = |tokenizer: &str| {
            TextOptions::default().set_indexing_options(
                TextFieldIndexing::default().set_tokenizer(tokenizer).set_index_option(IndexRecordOption::WithFreqs),
            )
        };
        let mut schema = Schema::builder();
        let row = schema.add_u64_field(ROW, FAST | INDEXED);
        let words = schema.add_text_field(WORDS, indexing(WORDS));
        let grams = schema.add_text_field(GRAMS, indexing(GRAMS));
        let index = Index::create_in_dir(directory, schema.build()).map_err(wrong)?;
        let (word_analyzer, gram_analyzer) = analyzers();
        index.tokenizers().register(WORDS, word_analyzer);
        index.tokenizers().register(GRAMS, gram_analyzer);
        let mut writer = index.writer_with_num_threads(1, 256 << 20).map_err(wrong)?;
        writer.set_merge_policy(Box::new(tantivy::merge_policy::NoMergePolicy));
        for item in 0..n_items {
            let mut document = TantivyDocument::default();
            document.add_u64(row, item as u64);
            for (at, (_, column)) in texts.iter().enumerate() {
                for _ in 0..if at == 0 { FIRST_COLUMN_TIMES } else { 1 } {
                    document.add_text(words, &column[item]);
                    document.add_text(grams, padded(&column[item]));
                }
            }
            writer.add_document(document).map_err(wrong)?;
        }
        writer.commit().map_err(wrong)?;
        writer.wait_merging_threads().map_err(wrong)
    }

    /// Opens an index by mmap.
    ///
    /// # Errors
    /// Missing or damaged files.
    pub fn open(directory: &Path) -> Result<Self, CatalogError> {
        let wrong = |e: tantivy::TantivyError| CatalogError::corrupt(directory, e.to_string());
        let mmap = MmapDirectory::open(directory).map_err(|e| CatalogError::corrupt(directory, e.to_string()))?;
        let index = Index::open(mmap).map_err(wrong)?;
        let field = |name| index.schema().get_field(name).map_err(wrong);
        let (words, grams) = (field(WORDS)?, field(GRAMS)?);
        field(ROW)?;
        let (word_analyzer, gram_analyzer) = analyzers();
        let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into().map_err(wrong)?;
        Ok(TextIndex { reader, words, grams, word_analyzer, gram_analyzer })
    }

    /// What is searched of an item with these texts, by column.
    pub fn analyse(&self, texts: &[String]) -> LiveText {
        let all = |analyzer: &TextAnalyzer, text: &str, times: usize, out: &mut Vec<String>| {
            let mut analyzer = analyzer.clone();
            let mut stream = analyzer.token_stream(text);
            while stream.advance() {
                (0..times).for_each(|_| out.push(stream.token().text.clone()));
            }
        };
        let (mut words, mut grams) = (Vec::new(), Vec::new());
        for (at, text) in texts.iter().enumerate() {
            let times = if at == 0 { FIRST_COLUMN_TIMES } else { 1 };
            all(&self.word_analyzer, text, times, &mut words);
            all(&self.gram_analyzer, &padded(text), times, &mut grams);
        }
        LiveText::new([words, grams])
    }

    /// As [`Self::search`], with the words that items have by now.
    ///
    /// # Errors
    /// The index could not be read.
    pub fn search_with(
        &self,
        query: &str,
        k: usize,
        items: Option<&LiveItems>,
        filter: &dyn Fn(u32) -> bool,
        out: &mut Vec<Scored>,
    ) -> Result<(), CatalogError> {
        let Some(items) = items.filter(|items| !items.texts().is_empty()) else {
            return self.search(query, k, filter, out);
        };
        let start = out.len();
        self.search(query, k, &|row| !items.hides_text(row) && filter(row), out)?;
        let wrong = |e: tantivy::TantivyError| CatalogError::file(Path::new("text"), e.to_string());
        let searcher = self.reader.searcher();
        let words = tokens(&self.word_analyzer, query, MAX_WORDS);
        let grams = tokens(&self.gram_analyzer, &padded(query), MAX_GRAMS);
        let (mut terms, mut weights) = (Vec::new(), Vec::new());
        for (number, (field, tokens, boost)) in
            [(self.words, words, WORD_BOOST), (self.grams, grams, 1.0)].into_iter().enumerate()
        {
            for (token, times) in tokens {
                let term = Term::from_field_text(field, &token);
                let weight = Bm25Weight::for_terms(&searcher, &[term]).map_err(wrong)?;
                terms.push(live_text::term(number, &token));
                weights.push((number, weight.boost_by(boost * times as f32)));
            }
        }
        let score = |at: usize, text: &LiveText, times: u32| {
            let (field, weight) = &weights[at];
            weight.score(FieldNormReader::fieldnorm_to_id(text.lengths[*field]), times)
        };
        items.texts().search(&terms, score, |row, text, score| {
            if items.holds_text(row, text) && filter(row) {
                out.push(Scored { row, score });
            }
        });
        out[start..].sort_by(best_first);
        out.truncate(start + k);
        Ok(())
    }

    /// Adds the `k` best items for the words of `query` to `out`: best first, ties by row, only rows that `filter`
    /// allows. Any text is a valid query; one without letters or digits finds nothing.
    ///
    /// # Errors
    /// The index could not be read.
    pub fn search(
        &self,
        query: &str,
        k: usize,
        filter: &dyn Fn(u32) -> bool,
        out: &mut Vec<Scored>,
    ) -> Result<(), CatalogError> {
        let wrong = |e: tantivy::TantivyError| CatalogError::file(Path::new("text"), e.to_string());
        let mut clauses: Vec<(Occur, Box<dyn Query>)> = Vec::new();
        let words = tokens(&self.word_analyzer, query, MAX_WORDS);
        let grams = tokens(&self.gram_analyzer, &padded(query), MAX_GRAMS);
        for (field, tokens, boost) in [(self.words, words, WORD_BOOST), (self.grams, grams, 1.0)] {
            for (token, times) in tokens {
                let term = TermQuery::new(Term::from_field_text(field, &token), IndexRecordOption::WithFreqs);
                clauses.push((Occur::Should, Box::new(BoostQuery::new(Box::new(term), boost * times as f32))));
            }
        }
        if clauses.is_empty() || k == 0 {
            return Ok(());
        }
        let (searcher, query) = (self.reader.searcher(), BooleanQuery::new(clauses));
        let start = out.len();
        // What the filter takes away is made up for by asking for more: at first a little, then as much as it takes.
        let mut limit = k + k / 2 + 32;
        loop {
            let found = searcher.search(&query, &TopDocs::with_limit(limit).order_by_score()).map_err(wrong)?;
            let is_all = found.len() < limit;
            for (score, address) in found {
                let rows = searcher.segment_reader(address.segment_ord).fast_fields().u64(ROW).map_err(wrong)?;
                if let Some(row) = rows.first(address.doc_id).and_then(|row| u32::try_from(row).ok())
                    && filter(row)
                {
                    out.push(Scored { row, score });
                }
            }
            if is_all || out.len() - start >= k {
                break;
            }
            out.truncate(start);
            limit *= 4;
        }
        out[start..].sort_by(best_first);
        out.truncate(start + k);
        Ok(())
    }
}

/// The distinct tokens of `text` with their counts, in the order of first appearance, at most `max`.
fn tokens(analyzer: &TextAnalyzer, text: &str, max: usize) -> Vec<(String, usize)> {
    let mut analyzer = analyzer.clone();
    let mut stream = analyzer.token_stream(text);
    let (mut found, mut places): (Vec<(String, usize)>, HashMap<String, usize>) = (Vec::new(), HashMap::new());
    while stream.advance() {
        let token = &stream.token().text;
        match places.get(token.as_str()) {
            Some(&at) => found[at].1 += 1,
            None if found.len() < max => {
                places.insert(token.clone(), found.len());
                found.push((token.clone(), 1));
            }
            None => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(titles: &[&str]) -> (tempfile::TempDir, TextIndex) {
        let dir = tempfile::tempdir().unwrap();
        let column = titles.iter().map(|t| (*t).to_owned()).collect();
        TextIndex::build(dir.path(), &[("title".into(), column)], titles.len()).unwrap();
        let index = TextIndex::open(dir.path()).unwrap();
        (dir, index)
    }

    fn rows(index: &TextIndex, query: &str) -> Vec<u32> {
        let mut out = Vec::new();
        index.search(query, 10, &|_| true, &mut out).unwrap();
        out.iter().map(|s| s.row).collect()
    }

    #[test]
    fn words_prefixes_and_typos() {
        let (_dir, index) = index(&["The Hunger Games", "Catching Fire", "A Game of Thrones", "Fire and Blood"]);
        assert_eq!(rows(&index, "hunger games")[0], 0);
        assert_eq!(rows(&index, "hung")[0], 0);
        assert_eq!(rows(&index, "thornes")[0], 2);
        assert_eq!(rows(&index, "CATCHING")[0], 1);
        assert!(rows(&index, "").is_empty());
        assert!(rows(&index, "?! \u{0} \" AND (").len() <= 4);
    }

    #[test]
    fn words_that_came_are_scored_as_those_of_the_bundle() {
        let titles = ["The Hunger Games", "Catching Fire", "A Game of Thrones", "Fire and Blood"];
        let (_dir, index) = index(&titles);
        // The third is no more what it was; a new one is what the second is.
        let mut items = LiveItems::new(4);
        let mut came = Vec::new();
        for (row, title) in [(2, "Winter"), (4, "Catching Fire")] {
            let text = std::sync::Arc::new(index.analyse(&[title.to_owned()]));
            items.put(
                row,
                std::sync::Arc::new(super::super::live::LiveItem { text: Some(text.clone()), ..Default::default() }),
            );
            came.push((row, text));
        }
        items.add_texts(came);
        let found = |query: &str, items: Option<&LiveItems>, k: usize| {
            let mut out = Vec::new();
            index.search_with(query, k, items, &|row| row != 3, &mut out).unwrap();
            out
        };
        let of = |found: &[Scored]| found.iter().map(|s| s.row).collect::<Vec<_>>();
        let fire = found("catching fire", Some(&items), 10);
        assert_eq!(of(&fire)[..2], [1, 4]);
        assert!((fire[0].score - fire[1].score).abs() <= 1e-5 * fire[0].score, "{fire:?}");
        assert_eq!(of(&found("catching fire", Some(&items), 1)), [1]);
        assert!(of(&found("thrones", None, 10)).contains(&2) && !of(&found("thrones", Some(&items), 10)).contains(&2));
        assert_eq!(of(&found("wintr", Some(&items), 10)), [2]);
        items.set_gone(4, true);
        let alive = |row: u32| !items.is_gone(row);
        let mut out = Vec::new();
        index.search_with("catching", 10, Some(&items), &alive, &mut out).unwrap();
        assert_eq!(of(&out)[0], 1);
        assert!(!of(&out).contains(&4));
    }

    #[test]
    fn a_strict_filter_does_not_starve() {
        let titles: Vec<String> = (0..300).map(|at| format!("fire {}", "and ice ".repeat(1 + at / 100))).collect();
        let (_dir, index) = index(&titles.iter().map(String::as_str).collect::<Vec<_>>());
        for allowed in [|row: u32| row == 299, |row| row % 150 == 149, |_| false] {
            let mut out = Vec::new();
            index.search("fire", 2, &allowed, &mut out).unwrap();
            let want = (0..300).filter(|&row| allowed(row)).count().min(2);
            assert_eq!(out.len(), want, "{out:?}");
        }
    }

    #[test]
    fn filter_is_obeyed() {
        let (_dir, index) = index(&["fire one", "fire two", "fire three"]);
        let mut out = Vec::new();
        index.search("fire", 10, &|row| row != 0, &mut out).unwrap();
        assert_eq!(out.iter().map(|s| s.row).collect::<Vec<_>>(), [1, 2]);
    }
}
