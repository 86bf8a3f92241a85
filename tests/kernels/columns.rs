//! The kernels that fill columns which depend on the item, or on its series.

use super::*;

fn copy(
    variant: &str,
    [n_requests, width]: [usize; 2],
    [n_items, n_more]: [usize; 2],
    n: usize,
    seed: u64,
) -> Result<(), String> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let all = n_items + n_more;
    let stride = n + random.random_range(0..4);
    let table: Vec<f32> = (0..all * n).map(|_| f32::from_bits(random.random())).collect();
    let mut columns: Vec<u32> = (0..stride as u32).collect();
    (1..stride).for_each(|at| columns.swap(at, random.random_range(0..=at)));
    columns.truncate(n);
    let rows: Vec<u32> = (0..n_requests * width).map(|_| random.random_range(0..all as u32 + 2)).collect();
    let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
    let mut want = vec![f32::from_bits(UNTOUCHED); n_requests * width * stride];
    let values = Buffer::new(&want);
    for (at, out) in want.chunks_mut(stride).enumerate() {
        if at % width < counts[at / width] as usize {
            twins::copy_columns(&table, rows[at], &columns, out);
        }
    }
    let (in_table, beside) = table.split_at(n_items * n);
    let [table, more] = [in_table, beside].map(Buffer::new);
    let [rows, counts, columns] = [&rows, &counts, &columns].map(|all| Buffer::new(all));
    let launch = kernels::CopyColumns {
        rows: rows.address(),
        counts: counts.address(),
        n_requests: n_requests as u32,
        width: width as u32,
        table: table.address(),
        n_items: n_items as u32,
        more: kernels::More { rows: more.address(), n: n_more as u32 },
        n: n as u32,
        columns: columns.address(),
        values: values.address(),
        stride: stride as u32,
    };
    run(variant, launch.launch(), seed)?;
    same("values", &bits(&values), &bits(&want))?;
    intact("values", &values)
}

fn series(
    variant: &str,
    [n_requests, width]: [usize; 2],
    [n_items, n_more]: [usize; 2],
    seed: u64,
) -> Result<(), String> {
    let random = &mut SmallRng::seed_from_u64(seed);
    let (all, stride, places_stride) = (n_items + n_more, 4, 5);
    let place = |random: &mut SmallRng| match random.random_range(0..8) {
        0 => f32::NAN,
        _ => random.random_range(0..30) as f32 / 2.0,
    };
    let items: Vec<(u32, f32)> = (0..all)
        .map(|_| (if random.random_ratio(1, 5) { NO_ROW } else { random.random_range(0..40) }, place(random)))
        .collect();
    let rows: Vec<u32> = (0..n_requests * width).map(|_| random.random_range(0..all as u32 + 2)).collect();
    let counts: Vec<u32> = (0..n_requests).map(|_| random.random_range(0..width as u32 + 3)).collect();
    let columns = [Some(2), (!seed.is_multiple_of(3)).then_some(0), (!seed.is_multiple_of(4)).then_some(3)];
    let (mut tail, mut places) = (vec![UNTOUCHED; 3], Vec::new());
    let mut want = vec![LEFT; n_requests * width * stride];
    for request in 0..n_requests {
        let known: Vec<(u32, f32, u32)> = (0..40)
            .filter(|_| random.random())
            .collect::<Vec<u32>>()
            .into_iter()
            .map(|code| (code, place(random), random.random_range(0..9)))
            .collect();
        places.extend([UNTOUCHED, UNTOUCHED, tail.len() as u32, known.len() as u32, UNTOUCHED]);
        tail.extend(known.iter().map(|known| known.0));
        tail.extend(known.iter().map(|known| known.1.to_bits()));
        tail.extend(known.iter().map(|known| known.2));
        for at in 0..width.min(counts[request] as usize) {
            let item = items.get(rows[request * width + at] as usize);
            let of = item.and_then(|(code, place)| Some((*place, known.iter().find(|known| known.0 == *code)?)));
            let said = twins::fill_series(of.map(|(place, known)| (place, known.1, known.2)));
            for (column, value) in columns.iter().zip(said) {
                column.iter().for_each(|column| want[(request * width + at) * stride + *column as usize] = value);
            }
        }
    }
    let logarithms: Vec<f32> = (0..100).map(|n| (n as f32).ln_1p()).collect();
    let words =
        |items: &[(u32, f32)]| items.iter().flat_map(|(code, place)| [*code, place.to_bits()]).collect::<Vec<_>>();
    let [items, more] = [&items[..n_items], &items[n_items..]].map(|items| Buffer::new(&words(items)));
    let (rows, counts, values) = (Buffer::new(&rows), Buffer::new(&counts), Buffer::new(&vec![LEFT; want.len()]));
    let (tail, places, logarithms) = (Buffer::new(&tail), Buffer::new(&places), Buffer::new(&logarithms));
    let launch = kernels::FillSeries {
        rows: rows.address(),
        counts: counts.address(),
        n_requests: n_requests as u32,
        width: width as u32,
        items: items.address(),
        n_items: n_items as u32,
        more: kernels::More { rows: more.address(), n: n_more as u32 },
        tail: tail.address(),
        places: places.address(),
        places_stride,
        place: 2,
        logarithms: logarithms.address(),
        n_logarithms: 100,
        values: values.address(),
        stride: stride as u32,
        columns,
    };
    run(variant, launch.launch(), seed)?;
    // A zero of either sign is 0 to whoever reads it.
    let plain = |values: &[f32]| bits(&values.iter().map(|value| value + 0.0).collect::<Vec<_>>());
    same("values", &plain(&values), &plain(&want))?;
    intact("values", &values)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn copy_columns_equals_its_twin(
        n_requests in 1usize..4, width in 1usize..300, n_items in 1usize..200, n_more in 0usize..100, n in 1usize..20, seed in any::<u64>(),
    ) {
        held(copy("plain", [n_requests, width], [n_items, n_more], n, seed))?;
    }

    #[test]
    fn fill_series_equals_the_cpu_s(
        n_requests in 1usize..4, width in 1usize..700, n_items in 1usize..200, n_more in 0usize..100, seed in any::<u64>(),
    ) {
        held(series("plain", [n_requests, width], [n_items, n_more], seed))?;
    }
}

/// Shapes that reach every part of a kernel.
pub fn check(kernel: &str, variant: &str, seed: u64) -> Result<(), String> {
    match kernel {
        "copy_columns" => copy(variant, [3, 100], [50, 40], 7, seed),
        _ => series(variant, [2, 500], [100, 60], seed),
    }
}
