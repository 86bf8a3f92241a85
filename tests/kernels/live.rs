//! The kernels that keep rows beside tables.

use super::*;

/// Pieces that go to different places, and some that are beyond an end.
fn pieces(n_staged: usize, n_target: usize, random: &mut SmallRng) -> Vec<[u32; 3]> {
    let (mut pieces, mut to) = (Vec::new(), 0);
    while to < n_target && pieces.len() < 60 {
        let n = random.random_range(0..400.min(n_staged + 2));
        let from = random.random_range(0..n_staged + 2);
        pieces.push([from as u32, to as u32, n as u32]);
        to += n + random.random_range(0..3);
    }
    pieces.push([u32::MAX, 0, 1]);
    pieces.push([0, u32::MAX, 2]);
    pieces.push([1, 1, u32::MAX]);
    pieces
}

fn apply(variant: &str, n_staged: usize, n_target: usize, seed: u64) -> Result<(), String> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let staged: Vec<u32> = (0..n_staged).map(|_| random.random()).collect();
    let (pieces, mut want) = (pieces(n_staged, n_target, random), vec![UNTOUCHED; n_target]);
    let target = Buffer::new(&want);
    twins::apply_changes(&staged, &pieces, &mut want);
    let (staged, flat) = (Buffer::new(&staged), Buffer::new(pieces.as_flattened()));
    let launch = kernels::ApplyChanges {
        staged: staged.address(),
        n_staged: n_staged as u32,
        pieces: flat.address(),
        n_pieces: pieces.len() as u32,
        target: target.address(),
        n_target: n_target as u32,
    };
    run(variant, launch.launch(), seed)?;
    same("target", &target, &want)?;
    intact("target", &target)
}

fn name(variant: &str, n: usize, n_rows: u32, n_more: u32, seed: u64) -> Result<(), String> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let names: Vec<u32> = (0..n_more).map(|_| random.random()).collect();
    let place = |_| if random.random_ratio(1, 9) { NO_ROW } else { random.random_range(0..n_rows + n_more + 3) };
    let places: Vec<u32> = (0..n).map(place).collect();
    let want: Vec<u32> = places.iter().map(|&place| twins::name_place(place, n_rows, &names)).collect();
    let (rows, names) = (Buffer::new(&places), Buffer::new(&names));
    let names = kernels::More { rows: names.address(), n: n_more };
    let launch = kernels::NamePlaces { rows: rows.address(), n: n as u32, n_rows, names };
    run(variant, launch.launch(), seed)?;
    same("rows", &rows, &want)?;
    intact("rows", &rows)
}

fn find(variant: &str, [n_requests, width]: [usize; 2], n_rows: u32, n_more: u32, seed: u64) -> Result<(), String> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let n_changed = random.random_range(0..=n_more.min(n_rows));
    let all = n_rows + n_more;
    let mut rows: Vec<u32> = (0..all).filter(|_| random.random_ratio(n_changed, all)).collect();
    rows.truncate(n_changed as usize);
    let mut slots: Vec<u32> = (0..n_more).collect();
    (1..slots.len()).for_each(|at| slots.swap(at, random.random_range(0..=at)));
    let changed: Vec<(u32, u32)> = rows.iter().copied().zip(slots).collect();
    let of_candidates: Vec<u32> = (0..n_requests * width)
        .map(|_| if random.random_ratio(1, 9) { NO_ROW } else { random.random_range(0..all + 2) })
        .collect();
    let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
    let mut want = vec![UNTOUCHED; n_requests * width];
    for (request, &count) in counts.iter().enumerate() {
        for at in (request * width..).take(width.min(count as usize)) {
            want[at] = twins::find_place(of_candidates[at], n_rows, &changed);
        }
    }
    // What lies behind the changed ones is of another time.
    let mut lists = vec![0u32; 2 * n_more as usize];
    for (at, (row, slot)) in changed.iter().enumerate() {
        (lists[at], lists[n_more as usize + at]) = (*row, *slot);
    }
    let (header, lists) = (Buffer::new_16(&[9, 9, changed.len() as u32, 9]), Buffer::new(&lists));
    let (rows, counts, places) =
        (Buffer::new(&of_candidates), Buffer::new(&counts), Buffer::new(&vec![UNTOUCHED; want.len()]));
    let launch = kernels::FindPlaces {
        header: header.address(),
        rows: rows.address(),
        counts: counts.address(),
        n_requests: n_requests as u32,
        width: width as u32,
        n_rows,
        changed: kernels::More { rows: lists.address(), n: n_more },
        places: places.address(),
    };
    run(variant, launch.launch(), seed)?;
    same("places", &places, &want)?;
    intact("places", &places)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn apply_changes_equals_its_twin(n_staged in 0usize..2000, n_target in 1usize..3000, seed in any::<u64>()) {
        held(apply("plain", n_staged, n_target, seed))?;
    }

    #[test]
    fn name_places_equals_its_twin(n in 1usize..900, n_rows in 0u32..500, n_more in 0u32..300, seed in any::<u64>()) {
        held(name("plain", n, n_rows, n_more, seed))?;
    }

    #[test]
    fn find_places_equals_its_twin(
        n_requests in 1usize..4, width in 1usize..700, n_rows in 1u32..500, n_more in 0u32..300, seed in any::<u64>(),
    ) {
        held(find("plain", [n_requests, width], n_rows, n_more, seed))?;
    }
}

/// Shapes that reach every part of a kernel.
pub fn check(kernel: &str, variant: &str, seed: u64) -> Result<(), String> {
    match kernel {
        "apply_changes" => apply(variant, 900, 5000, seed),
        "name_places" => name(variant, 700, 200, 100, seed),
        _ => find(variant, [3, 400], 200, 100, seed),
    }
}
