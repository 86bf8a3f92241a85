//! The kernels that make whole rows for models of other engines.

use tastemaker_kernels::{RowKind, RowPart};

use super::*;

#[derive(Clone, Debug)]
pub struct Assemble {
    pub n_requests: usize,
    pub width: usize,
    pub n_items: usize,
    pub n_more: usize,
    /// Values of a request, of an item, of a candidate.
    pub parts: [usize; 3],
    pub n_values: usize,
    pub kind: RowKind,
}

impl Assemble {
    pub fn any() -> impl Strategy<Value = Assemble> {
        let kind = prop::sample::select(vec![RowKind::F32, RowKind::I32, RowKind::I64]);
        let parts = prop::array::uniform3(0usize..20).prop_map(|[one, two, three]| [one, two, three + 1]);
        (1usize..4, 1usize..80, 1usize..60, 0usize..60, parts, 1usize..30, kind).prop_map(
            |(n_requests, width, n_items, n_more, parts, n_values, kind)| Assemble {
                n_requests,
                width,
                n_items,
                n_more,
                parts,
                n_values,
                kind,
            },
        )
    }

    pub fn every(seed: u64) -> Self {
        let kind = [RowKind::F32, RowKind::I32, RowKind::I64][seed as usize % 3];
        Assemble { n_requests: 3, width: 45, n_items: 30, n_more: 20, parts: [7, 5, 6], n_values: 17, kind }
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Assemble { n_requests, width, n_items, n_more, parts, n_values, kind } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 2147483648.0, -2147483648.0, 9.3e18, -9.3e18];
        let mut take = |n: usize| -> Vec<f32> {
            let value = |_| match random.random_range(0..12) {
                0 => special[random.random_range(0..special.len())],
                1..4 => random.random_range(-1e10f32..1e10),
                _ => random.random_range(-99.0f32..99.0),
            };
            (0..n).map(value).collect()
        };
        let sizes = [n_requests, n_items + n_more, n_requests * width];
        let values: Vec<Vec<f32>> = sizes.iter().zip(parts).map(|(n, part)| take(n * part)).collect();
        let rows: Vec<u32> =
            (0..n_requests * width)
                .map(|_| {
                    if random.random_ratio(1, 9) {
                        NO_ROW
                    } else {
                        random.random_range(0..(n_items + n_more) as u32 + 2)
                    }
                })
                .collect();
        let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
        let there: Vec<usize> = (0..3).filter(|&part| parts[part] > 0).collect();
        let places: Vec<RowPart> = (0..n_values)
            .map(|_| {
                let part = there[random.random_range(0..there.len())];
                let which = random.random_range(0..parts[part] as u32);
                [RowPart::Shared(which), RowPart::Item(which), RowPart::Candidate(which)][part]
            })
            .collect();
        let slots = twins::Slots { rows: &rows, counts: &counts, width, n_items: (n_items + n_more) as u32 };
        let from = std::array::from_fn(|part| (&values[part][..], parts[part]));
        let want = twins::assemble_rows(slots, from, &places, kind);
        let codes: Vec<u32> = places.iter().map(|place| place.code()).collect();
        let (in_table, beside) = values[1].split_at(n_items * parts[1]);
        let [shared, table, columns, more] = [&values[0], in_table, &values[2], beside].map(Buffer::new);
        let (on_rows, on_counts, codes) = (Buffer::new(&rows), Buffer::new(&counts), Buffer::new(&codes));
        let out = Buffer::new_16(&vec![UNTOUCHED; want.len()]);
        let launch = kernels::AssembleRows {
            rows: on_rows.address(),
            counts: on_counts.address(),
            n_requests: n_requests as u32,
            width: width as u32,
            shared: shared.address(),
            n_shared: parts[0] as u32,
            table: table.address(),
            n_items: n_items as u32,
            more: kernels::More { rows: more.address(), n: n_more as u32 },
            n_item: parts[1] as u32,
            columns: columns.address(),
            n_columns: parts[2] as u32,
            places: codes.address(),
            n_values: n_values as u32,
            kind,
            values: out.address(),
        };
        run(variant, launch.launch(), seed)?;
        same("values", &out, &want)?;
        intact("values", &out)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Holes {
    pub n_requests: usize,
    pub width: usize,
    pub n_items: usize,
}

impl Holes {
    pub fn any() -> impl Strategy<Value = Holes> {
        (1usize..5, 1usize..300, 1usize..60).prop_map(|(n_requests, width, n_items)| Holes {
            n_requests,
            width,
            n_items,
        })
    }

    pub fn check(&self, variant: &str, seed: u64) -> Result<(), String> {
        let &Holes { n_requests, width, n_items } = self;
        let random = &mut SmallRng::seed_from_u64(seed);
        let rows: Vec<u32> = (0..n_requests * width).map(|_| random.random_range(0..n_items as u32 + 2)).collect();
        let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
        let mut want = vec![0.5; rows.len()];
        let scores = Buffer::new(&want);
        let slots = twins::Slots { rows: &rows, counts: &counts, width, n_items: n_items as u32 };
        twins::void_holes(slots, &mut want);
        let (rows, counts) = (Buffer::new(&rows), Buffer::new(&counts));
        let launch = kernels::VoidHoles {
            rows: rows.address(),
            counts: counts.address(),
            n_requests: n_requests as u32,
            width: width as u32,
            n_items: n_items as u32,
            scores: scores.address(),
        };
        run(variant, launch.launch(), seed)?;
        same("scores", &bits(&scores), &want.iter().map(|score| score.to_bits()).collect::<Vec<_>>())?;
        intact("scores", &scores)
    }
}
