//! Ensembles of decision trees, scored for 16 rows at once.
//!
//! A tree is not walked. As in QuickScorer (Lucchese et al., SIGIR 2015), every row keeps one bit per leaf, a test that does not
//! hold clears the leaves below its "yes" branch, and the first bit left is the leaf that the row ends in; tests have no order, so
//! there is nothing to mispredict and rows share every load. Departures: tests stay with their tree instead of being sorted by
//! feature, because sixteen rows hardly ever agree on where to stop; leaves lie in words of 32 bits, and a tree of several words
//! visits, for each word, only the tests that touch it; and where a tree has many leaves for few rows, it is walked after all.
#![allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected.

use crate::index::Kernel;

/// Rows that are scored together.
pub const ROWS: usize = 64;
/// Rows in a register.
const LANES: usize = 16;
/// Leaves of a word.
const WORD: usize = 32;
/// Tests against which sixteen rows cost about what one row's walk does: with so many of them per row, a tree is walked.
const TESTS_PER_WALK: usize = 32;
/// A tree of more tests is walked by any number of rows; it also bounds the memory that a crooked tree of many words takes.
const MAX_TESTS: usize = 4096;

/// One value for each of [`ROWS`] rows.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(align(64))]
pub struct Column(pub [f32; ROWS]);

/// What a node asks of a feature.
#[derive(Clone, Debug, PartialEq)]
pub enum Test {
    /// `value <= threshold`
    AtMost(f32),
    /// The value is one of these.
    In(Vec<f32>),
}

impl Test {
    /// Whether it holds; for NaN, `missing`.
    pub fn holds(&self, value: f32, missing: bool) -> bool {
        match self {
            _ if value.is_nan() => missing,
            Test::AtMost(threshold) => value <= *threshold,
            Test::In(values) => values.contains(&value),
        }
    }
}

/// A node of a tree.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// What the leaf adds, by target; no target twice.
    Leaf(Vec<(u32, f32)>),
    /// Two branches.
    Split {
        /// Position in the row.
        feature: u32,
        /// Decides.
        test: Test,
        /// Whether a row whose value is NaN takes the `yes` branch.
        missing: bool,
        /// The node where the test holds.
        yes: u32,
        /// The node where it does not.
        no: u32,
    },
}

/// Nodes, the root first, every other one the child of exactly one that stands before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tree(pub Vec<Node>);

impl Tree {
    /// Leaves below each node.
    fn n_leaves(&self) -> Vec<u32> {
        let mut below = vec![1u32; self.0.len()];
        for (at, node) in self.0.iter().enumerate().rev() {
            if let Node::Split { yes, no, .. } = node {
                below[at] = below[*yes as usize] + below[*no as usize];
            }
        }
        below
    }
}

/// `value <= threshold`, or else the leaves of `keep` are what is left.
#[derive(Clone, Copy, Debug)]
struct AtMost {
    feature: u32,
    threshold: f32,
    keep: u32,
}

/// The value is one of `values`, or else the leaves of `keep` are what is left.
#[derive(Clone, Copy, Debug)]
struct Among {
    feature: u32,
    keep: u32,
    values: Span,
    missing: bool,
}

/// A part of one of the forest's lists.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    from: u32,
    to: u32,
}

impl Span {
    fn of<T>(self, list: &[T]) -> &[T] {
        &list[self.from as usize..self.to as usize]
    }
}

/// 32 leaves of a tree and the tests that may clear some of them.
#[derive(Clone, Copy, Debug, Default)]
struct Word {
    /// NaN does not hold.
    at_most: Span,
    /// NaN holds.
    at_most_or_missing: Span,
    among: Span,
    /// In `leaves`, one set per target of the tree.
    leaves: u32,
}

/// A step of a tree that is walked. A leaf leads to itself.
#[derive(Clone, Copy, Debug)]
struct Step {
    feature: u32,
    threshold: f32,
    yes: u32,
    no: u32,
    missing: bool,
    /// Empty: compared with the threshold.
    values: Span,
    /// Of a leaf, its number from the left.
    leaf: u32,
}

/// Where a tree lies in the forest's lists.
#[derive(Clone, Copy, Debug)]
struct Packed {
    /// In all words.
    n_tests: u32,
    /// Empty beyond [`MAX_TESTS`].
    words: Span,
    /// Empty for a tree that never walks.
    steps: Span,
    targets: Span,
    /// Where its sets of `leaves` begin.
    leaves: u32,
}

impl Packed {
    fn walks(&self, n: usize) -> bool {
        let n_tests = self.n_tests as usize;
        n_tests > MAX_TESTS || n * TESTS_PER_WALK <= n_tests
    }
}

/// Trees ready for scoring.
#[derive(Debug)]
pub struct Forest {
    kernel: Kernel,
    n_targets: usize,
    n_features: usize,
    /// In the order in which they are added up.
    trees: Vec<Packed>,
    words: Vec<Word>,
    at_most: Vec<AtMost>,
    among: Vec<Among>,
    values: Vec<f32>,
    steps: Vec<Step>,
    targets: Vec<u32>,
    /// Values of 32 leaves.
    leaves: Vec<[f32; WORD]>,
}

impl Forest {
    /// Packs trees for a kernel.
    ///
    /// # Panics
    /// If a tree is not as [`Tree`] says.
    pub fn new(trees: &[Tree], n_targets: usize, kernel: Kernel) -> Self {
        let kernel = match kernel {
            // AVX2 comes with AVX-512F.
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 if !is_x86_feature_detected!("avx512cd") => Kernel::Avx2,
            kernel => kernel,
        };
        let mut forest = Forest {
            kernel,
            n_targets,
            n_features: 0,
            trees: Vec::new(),
            words: Vec::new(),
            at_most: Vec::new(),
            among: Vec::new(),
            values: Vec::new(),
            steps: Vec::new(),
            targets: Vec::new(),
            leaves: Vec::new(),
        };
        for tree in trees {
            let below = tree.n_leaves();
            let mut first = vec![0u32; tree.0.len()];
            let mut targets: Vec<u32> = Vec::new();
            for (at, node) in tree.0.iter().enumerate() {
                match node {
                    Node::Leaf(votes) => targets.extend(votes.iter().map(|(target, _)| *target)),
                    Node::Split { feature, yes, no, .. } => {
                        assert!(*yes as usize > at && *no as usize > at && yes != no, "a child before its parent");
                        forest.n_features = forest.n_features.max(*feature as usize + 1);
                        first[*yes as usize] = first[at];
                        first[*no as usize] = first[at] + below[*yes as usize];
                    }
                }
            }
            targets.sort_unstable();
            targets.dedup();
            assert!(targets.last().is_none_or(|last| (*last as usize) < n_targets), "a target that there is not");
            let n_leaves = below[0] as usize;
            let leaves = forest.pack_leaves(tree, &first, n_leaves, &targets);
            let tests = tree.0.iter().map(|node| match node {
                Node::Leaf(_) => 0,
                Node::Split { yes, .. } => {
                    let (from, n) = (first[*yes as usize] as usize, below[*yes as usize] as usize);
                    (from + n - 1) / WORD - from / WORD + 1
                }
            });
            let n_tests = tests.sum::<usize>();
            let words = match n_tests {
                ..=MAX_TESTS => forest.pack_words(tree, &first, &below, leaves, targets.len()),
                _ => Span::default(),
            };
            let walks = n_tests >= TESTS_PER_WALK;
            let steps = if walks { forest.pack_steps(tree, &first) } else { Span::default() };
            let targets = extend(&mut forest.targets, &targets);
            forest.trees.push(Packed { n_tests: n_tests as u32, words, steps, targets, leaves });
        }
        forest
    }

    fn pack_words(&mut self, tree: &Tree, first: &[u32], below: &[u32], leaves: u32, n_targets: usize) -> Span {
        let from = self.words.len() as u32;
        let n_words = (below[0] as usize).div_ceil(WORD) as u32;
        for word in 0..n_words {
            let (mut plain, mut or_missing) = (Vec::new(), Vec::new());
            let among = self.among.len() as u32;
            for node in &tree.0 {
                let Node::Split { feature, test, missing, yes, .. } = node else { continue };
                // The leaves below `yes`, as bits of this word from the highest one.
                let from = first[*yes as usize].max(word * WORD as u32);
                let to = (first[*yes as usize] + below[*yes as usize]).min((word + 1) * WORD as u32);
                if from >= to {
                    continue;
                }
                let bits = (u64::MAX << (WORD as u32 - (to - from))) as u32 >> (from - word * WORD as u32);
                let (feature, keep) = (*feature, !bits);
                match test {
                    Test::AtMost(threshold) if *missing => {
                        or_missing.push(AtMost { feature, threshold: *threshold, keep });
                    }
                    Test::AtMost(threshold) => plain.push(AtMost { feature, threshold: *threshold, keep }),
                    Test::In(values) => {
                        let values = extend(&mut self.values, values);
                        self.among.push(Among { feature, keep, values, missing: *missing });
                    }
                }
            }
            let word = Word {
                at_most: extend(&mut self.at_most, &plain),
                at_most_or_missing: extend(&mut self.at_most, &or_missing),
                among: Span { from: among, to: self.among.len() as u32 },
                leaves: leaves + word * n_targets as u32,
            };
            self.words.push(word);
        }
        Span { from, to: self.words.len() as u32 }
    }

    fn pack_steps(&mut self, tree: &Tree, first: &[u32]) -> Span {
        let from = self.steps.len() as u32;
        for (at, node) in tree.0.iter().enumerate() {
            let step = match node {
                Node::Leaf(_) => Step {
                    feature: 0,
                    threshold: 0.0,
                    yes: at as u32,
                    no: at as u32,
                    missing: false,
                    values: Span::default(),
                    leaf: first[at],
                },
                Node::Split { feature, test, missing, yes, no } => {
                    let (threshold, values) = match test {
                        Test::AtMost(threshold) => (*threshold, Span::default()),
                        // Nothing is at most NaN: a test for none of no values never holds.
                        Test::In(values) => (f32::NAN, extend(&mut self.values, values)),
                    };
                    Step { feature: *feature, threshold, yes: *yes, no: *no, missing: *missing, values, leaf: 0 }
                }
            };
            self.steps.push(step);
        }
        Span { from, to: self.steps.len() as u32 }
    }

    /// Values of the leaves, `[words, targets, WORD]`; returns where they begin.
    fn pack_leaves(&mut self, tree: &Tree, first: &[u32], n_leaves: usize, targets: &[u32]) -> u32 {
        let from = self.leaves.len();
        let n_words = n_leaves.div_ceil(WORD);
        self.leaves.resize(from + n_words * targets.len(), [0.0; WORD]);
        for (at, node) in tree.0.iter().enumerate() {
            let Node::Leaf(votes) = node else { continue };
            let (word, bit) = (first[at] as usize / WORD, first[at] as usize % WORD);
            for (target, value) in votes {
                let place = targets.binary_search(target).unwrap_or_else(|_| unreachable!("collected before"));
                self.leaves[from + word * targets.len() + place][bit] += value;
            }
        }
        from as u32
    }

    /// Features that [`Self::score`] reads: the highest one of any test, plus 1.
    pub fn n_features(&self) -> usize {
        self.n_features
    }

    /// Targets that it adds up.
    pub fn n_targets(&self) -> usize {
        self.n_targets
    }

    /// Adds the trees' values for the first `n` rows of `features` (`[n_features]`) to `sums` (`[n_targets]`), in the order of
    /// the trees. What it adds to the other rows, and reads of them, is of no meaning.
    ///
    /// # Panics
    /// If there are too few features or sums, or more than [`ROWS`] rows.
    pub fn score(&self, features: &[Column], n: usize, sums: &mut [Column]) {
        assert!(features.len() >= self.n_features && sums.len() >= self.n_targets && n <= ROWS);
        match (self.kernel, n.div_ceil(LANES)) {
            (_, 0) => {}
            // SAFETY: this variant is only kept if AVX-512F and CD were detected on this CPU.
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx512, groups) => unsafe {
                match groups {
                    1 => self.score_avx512::<1>(features, n, sums),
                    2 => self.score_avx512::<2>(features, n, sums),
                    3 => self.score_avx512::<3>(features, n, sums),
                    _ => self.score_avx512::<4>(features, n, sums),
                }
            },
            // SAFETY: this variant is only made after AVX2 was detected on this CPU.
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx2, _) => unsafe { self.score_avx2(features, n, sums) },
            _ => self.score_arrays(features, n, sums),
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn score_avx2(&self, features: &[Column], n: usize, sums: &mut [Column]) {
        self.score_arrays(features, n, sums);
    }

    /// The compiler makes vectors of the arrays, as wide as the function that this is inlined into has them.
    #[inline(always)]
    fn score_arrays(&self, features: &[Column], n: usize, sums: &mut [Column]) {
        for tree in &self.trees {
            if tree.walks(n) {
                self.walk(tree, features, n, sums);
                continue;
            }
            let targets = tree.targets.of(&self.targets);
            for group in 0..n.div_ceil(LANES) {
                let mut open = [true; LANES];
                for word in tree.words.of(&self.words) {
                    let left = self.bits_left(word, features, group);
                    let here: [bool; LANES] = std::array::from_fn(|lane| open[lane] && left[lane] != 0);
                    for (leaves, &target) in self.leaves[word.leaves as usize..].iter().zip(targets) {
                        let sums = group_mut(&mut sums[target as usize], group);
                        for lane in 0..LANES {
                            if here[lane] {
                                sums[lane] += leaves[left[lane].leading_zeros() as usize % WORD];
                            }
                        }
                    }
                    for lane in 0..LANES {
                        open[lane] &= left[lane] == 0;
                    }
                }
            }
        }
    }

    /// The leaves of a word that each row may still end in, from the highest bit.
    #[inline(always)]
    fn bits_left(&self, word: &Word, features: &[Column], group: usize) -> [u32; LANES] {
        let mut left = [u32::MAX; LANES];
        for test in word.at_most.of(&self.at_most) {
            let values = group_of(&features[test.feature as usize], group);
            for lane in 0..LANES {
                left[lane] &= if values[lane] <= test.threshold { u32::MAX } else { test.keep };
            }
        }
        for test in word.at_most_or_missing.of(&self.at_most) {
            let values = group_of(&features[test.feature as usize], group);
            for lane in 0..LANES {
                left[lane] &= if values[lane] > test.threshold { test.keep } else { u32::MAX };
            }
        }
        for test in word.among.of(&self.among) {
            let values = group_of(&features[test.feature as usize], group);
            let mut holds: [bool; LANES] = std::array::from_fn(|lane| test.missing && values[lane].is_nan());
            for one in test.values.of(&self.values) {
                for lane in 0..LANES {
                    holds[lane] |= values[lane] == *one;
                }
            }
            for lane in 0..LANES {
                left[lane] &= if holds[lane] { u32::MAX } else { test.keep };
            }
        }
        left
    }

    /// Up to sixteen rows at a time down one tree, level by level, until none moves any more.
    fn walk(&self, tree: &Packed, features: &[Column], n: usize, sums: &mut [Column]) {
        let (steps, targets) = (tree.steps.of(&self.steps), tree.targets.of(&self.targets));
        for first in (0..n).step_by(LANES) {
            let mut places = [0u32; LANES];
            let places = &mut places[..LANES.min(n - first)];
            let mut moved = true;
            while moved {
                moved = false;
                for (lane, place) in places.iter_mut().enumerate() {
                    let step = &steps[*place as usize];
                    let value = features[step.feature as usize].0[first + lane];
                    let holds = value <= step.threshold || (step.missing && value.is_nan());
                    let listed = step.values.from != step.values.to && step.values.of(&self.values).contains(&value);
                    let next = if holds || listed { step.yes } else { step.no };
                    moved |= next != *place;
                    *place = next;
                }
            }
            for (lane, place) in places.iter().enumerate() {
                let leaf = steps[*place as usize].leaf as usize;
                let values = &self.leaves[tree.leaves as usize + leaf / WORD * targets.len()..];
                for (values, &target) in values.iter().zip(targets) {
                    sums[target as usize].0[first + lane] += values[leaf % WORD];
                }
            }
        }
    }

    /// `G` groups of 16 rows: a test's threshold and mask are loaded once for all of them.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512cd")]
    fn score_avx512<const G: usize>(&self, features: &[Column], n: usize, sums: &mut [Column]) {
        use std::arch::x86_64::*;
        // SAFETY, here and below: a group has the sixteen values that a register takes.
        let load = |column: &Column, group: usize| unsafe { _mm512_loadu_ps(group_of(column, group).as_ptr()) };
        for tree in &self.trees {
            if tree.walks(n) {
                self.walk(tree, features, n, sums);
                continue;
            }
            let targets = tree.targets.of(&self.targets);
            let mut open = [u16::MAX; G];
            for word in tree.words.of(&self.words) {
                let mut left = [_mm512_set1_epi32(-1); G];
                for test in word.at_most.of(&self.at_most) {
                    let column = &features[test.feature as usize];
                    let (threshold, keep) = (_mm512_set1_ps(test.threshold), _mm512_set1_epi32(test.keep as i32));
                    for (group, left) in left.iter_mut().enumerate() {
                        let fails = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(load(column, group), threshold);
                        *left = _mm512_mask_and_epi32(*left, fails, *left, keep);
                    }
                }
                for test in word.at_most_or_missing.of(&self.at_most) {
                    let column = &features[test.feature as usize];
                    let (threshold, keep) = (_mm512_set1_ps(test.threshold), _mm512_set1_epi32(test.keep as i32));
                    for (group, left) in left.iter_mut().enumerate() {
                        let fails = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(load(column, group), threshold);
                        *left = _mm512_mask_and_epi32(*left, fails, *left, keep);
                    }
                }
                for test in word.among.of(&self.among) {
                    let column = &features[test.feature as usize];
                    let keep = _mm512_set1_epi32(test.keep as i32);
                    for (group, left) in left.iter_mut().enumerate() {
                        let value = load(column, group);
                        let mut fails = match test.missing {
                            true => _mm512_cmp_ps_mask::<_CMP_ORD_Q>(value, value),
                            false => u16::MAX,
                        };
                        for one in test.values.of(&self.values) {
                            fails = _mm512_mask_cmp_ps_mask::<_CMP_NEQ_UQ>(fails, value, _mm512_set1_ps(*one));
                        }
                        *left = _mm512_mask_and_epi32(*left, fails, *left, keep);
                    }
                }
                let here: [u16; G] =
                    std::array::from_fn(|group| open[group] & _mm512_test_epi32_mask(left[group], left[group]));
                for (leaves, &target) in self.leaves[word.leaves as usize..].iter().zip(targets) {
                    let (low, high) = leaves.split_at(LANES);
                    // SAFETY: as above.
                    let (low, high) = unsafe { (_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())) };
                    let column = &mut sums[target as usize];
                    for group in 0..G {
                        // Of a row without a leaf here it is 32, which reads the first leaf, and is not added.
                        let leaf = _mm512_lzcnt_epi32(left[group]);
                        let value = _mm512_permutex2var_ps(low, leaf, high);
                        let sum = load(column, group);
                        let sum = _mm512_mask_add_ps(sum, here[group], sum, value);
                        // SAFETY: as above.
                        unsafe { _mm512_storeu_ps(group_mut(column, group).as_mut_ptr(), sum) };
                    }
                }
                for group in 0..G {
                    open[group] &= !here[group];
                }
            }
        }
    }
}

/// Appends to a list; returns where.
fn extend<T: Clone>(list: &mut Vec<T>, more: &[T]) -> Span {
    let from = list.len() as u32;
    list.extend_from_slice(more);
    Span { from, to: list.len() as u32 }
}

#[inline(always)]
fn group_of(column: &Column, group: usize) -> &[f32; LANES] {
    &column.0.as_chunks::<LANES>().0[group]
}

#[inline(always)]
fn group_mut(column: &mut Column, group: usize) -> &mut [f32; LANES] {
    &mut column.0.as_chunks_mut::<LANES>().0[group]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The obvious way: from the root to a leaf.
    pub fn walked(trees: &[Tree], n_targets: usize, row: impl Fn(usize) -> f32) -> Vec<f32> {
        fn leaf<'a>(tree: &'a Tree, at: u32, row: &impl Fn(usize) -> f32) -> &'a [(u32, f32)] {
            match &tree.0[at as usize] {
                Node::Leaf(votes) => votes,
                Node::Split { feature, test, missing, yes, no } => {
                    leaf(tree, if test.holds(row(*feature as usize), *missing) { *yes } else { *no }, row)
                }
            }
        }
        let mut sums = vec![0.0; n_targets];
        for tree in trees {
            for (target, value) in leaf(tree, 0, &row) {
                sums[*target as usize] += value;
            }
        }
        sums
    }

    /// A tree of `n_leaves` leaves, of any form; values on a coarse grid, so that many are equal to thresholds.
    fn grown(n_leaves: usize, n_features: u32, n_targets: u32, next: &mut impl FnMut() -> f32) -> Tree {
        let mut pick = |n: usize| ((next() + 0.5) * n as f32) as usize % n.max(1);
        let mut nodes = vec![Node::Leaf(Vec::new())];
        let mut leaves = vec![0usize];
        while leaves.len() < n_leaves {
            let at = leaves.swap_remove(pick(leaves.len()));
            let (yes, no) = (nodes.len() as u32, nodes.len() as u32 + 1);
            let test = match pick(4) {
                0 => Test::In((0..pick(5)).map(|_| pick(9) as f32 - 4.0).collect()),
                _ => Test::AtMost(pick(9) as f32 - 4.0),
            };
            nodes[at] = Node::Split {
                feature: pick(n_features as usize) as u32,
                test,
                missing: pick(2) == 0,
                yes: if pick(2) == 0 { yes } else { no },
                no: 0,
            };
            if let Node::Split { yes: y, no: n, .. } = &mut nodes[at] {
                *n = yes + no - *y;
            }
            nodes.extend([Node::Leaf(Vec::new()), Node::Leaf(Vec::new())]);
            leaves.extend([yes as usize, no as usize]);
        }
        for node in &mut nodes {
            if let Node::Leaf(votes) = node {
                for target in 0..n_targets {
                    if pick(4) > 0 {
                        votes.push((target, pick(1000) as f32 / 64.0 - 7.0));
                    }
                }
            }
        }
        Tree(nodes)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn every_kernel_agrees_with_the_walk(
            leaves in prop::collection::vec(prop_oneof![1usize..40, 30usize..100, 200usize..400, 3000usize..5000], 0..5),
            n in 0usize..=ROWS, n_features in 1u32..7, n_targets in 1u32..4, seed in any::<u64>(),
        ) {
            let mut next = crate::testing::noise(seed);
            let trees: Vec<Tree> = leaves.iter().map(|&n| grown(n, n_features, n_targets, &mut next)).collect();
            let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 1e-45];
            let features: Vec<Column> = (0..n_features).map(|_| Column(std::array::from_fn(|_| match next() {
                v if v > 0.45 => special[(v * 1e6) as usize % special.len()],
                v => (v * 12.0).round(),
            }))).collect();
            for kernel in Kernel::available() {
                let forest = Forest::new(&trees, n_targets as usize, kernel);
                let mut sums = vec![Column([0.0; ROWS]); n_targets as usize];
                forest.score(&features, n, &mut sums);
                for row in 0..n {
                    let want = walked(&trees, n_targets as usize, |feature| features[feature].0[row]);
                    for (target, want) in want.iter().enumerate() {
                        // The same values in the same order: the same sum to the bit.
                        let got = sums[target].0[row];
                        prop_assert_eq!(got.to_bits(), want.to_bits(), "{:?} row {}: {} {}", kernel, row, got, want);
                    }
                }
            }
        }
    }

    #[test]
    fn missing_values_go_where_the_node_says() {
        let leaf = |value: f32| Node::Leaf(vec![(0, value)]);
        for (test, missing, want) in [
            (Test::AtMost(1.0), false, [1.0, 1.0, 2.0, 2.0]),
            (Test::AtMost(1.0), true, [1.0, 1.0, 2.0, 1.0]),
            (Test::In(vec![0.0, 3.0]), false, [1.0, 2.0, 1.0, 2.0]),
            (Test::In(vec![0.0, 3.0]), true, [1.0, 2.0, 1.0, 1.0]),
        ] {
            let tree = Tree(vec![Node::Split { feature: 0, test, missing, yes: 1, no: 2 }, leaf(1.0), leaf(2.0)]);
            let mut column = Column([0.0; ROWS]);
            column.0[..4].copy_from_slice(&[-0.0, 1.0, 3.0, f32::NAN]);
            for kernel in Kernel::available() {
                let mut sums = [Column([0.0; ROWS])];
                Forest::new(std::slice::from_ref(&tree), 1, kernel).score(&[column], 4, &mut sums);
                assert_eq!(sums[0].0[..4], want, "{kernel:?} {tree:?}");
            }
        }
    }
}
