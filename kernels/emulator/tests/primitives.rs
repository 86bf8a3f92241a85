//! The emulator's primitives do what CUDA's documentation says of them, and each misuse is reported.

use tastemaker_emulator::{Buffer, Finding, launch};
use tastemaker_kernels::Launch;

fn run<const N: usize>(kernel: &'static str, blocks: u32, arguments: [u64; N], seed: u64) -> Result<(), Finding> {
    let mut one = Launch::new(kernel, [blocks, 1, 1], arguments);
    (one.block, one.shared_bytes) = (64, 512);
    // SAFETY: the buffers given are as large as the kernels want, or it is the point that they are not, and a guard page tells.
    unsafe { launch("selftest", &one, seed) }
}

/// What `primitives` has for thread `t` of 64.
fn expected(t: u32) -> Vec<u32> {
    let (lane, warp) = (t % 32, t / 32 * 32);
    let over = |of: &dyn Fn(u32) -> bool| (0..32).filter(|&l| of(warp + l)).fold(0u32, |set, l| set | 1 << l);
    let all = || (0..32).map(|l| warp + l);
    let half = |odd: bool| (0..16).filter(|l| (l % 2 == 1) == odd).fold(0u32, |set, l| set | 1 << l);
    let t64 = u64::from(t) << 20;
    let first_set = |x: u32| if x == 0 { 0 } else { x.trailing_zeros() + 1 };
    vec![
        warp + lane * 7 % 32,
        t / 8 * 8 + 3,
        t ^ 5,
        if lane % 16 >= 3 { t - 3 } else { t },
        if lane % 16 < 13 { t + 3 } else { t },
        t ^ 1,
        warp + 9,
        over(&|t| t.is_multiple_of(3)),
        u32::from(warp == 32),
        u32::from(warp == 0),
        all().sum(),
        warp + 5,
        warp + 31,
        (10 - 31i32) as u32,
        -5i32 as u32,
        all().map(|t| t | 0xff00).fold(u32::MAX, |a, b| a & b),
        u32::MAX,
        all().fold(0, |a, b| a ^ b),
        over(&|other| other % 5 == t % 5),
        if lane < 16 { half(true) } else { half(false) << 16 },
        16,
        0,
        1,
        t.count_ones() | first_set(t) << 8 | t.leading_zeros() << 16,
        t64.leading_zeros() | t.count_ones() << 8 | first_set(t) << 16,
    ]
}

#[test]
fn primitives_do_what_cuda_does() {
    let n = expected(0).len();
    for seed in 0..12 {
        let out = Buffer::new(&vec![0u32; 2 * 64 * n]);
        run("primitives", 2, [out.address(), n as u64], seed).unwrap();
        for (at, got) in out.chunks_exact(n).enumerate() {
            assert_eq!(got, expected(at as u32 % 64), "seed {seed}, thread {at}");
        }
        assert!(out.intact());
    }
}

#[test]
fn memories_and_atomics() {
    for seed in 0..12 {
        let (out, counters) = (Buffer::new(&[0u32; 73]), Buffer::new(&[0u32; 2]));
        run("memories", 3, [out.address(), counters.address()], seed).unwrap();
        for t in 0..64u32 {
            assert_eq!(out[t as usize], 63 - t + (63 - t) * 100);
        }
        let sum: u32 = (0..64).sum();
        assert_eq!(out[64..], [sum, 0u32.wrapping_sub(64), 63, 0, u32::MAX, 0, 0xffff_ff00, 1, 77]);
        assert_eq!(counters[..], [3 * sum, 63]);
    }
}

/// Rounded to the nearest bf16, ties to even.
fn bf16(value: f32) -> u32 {
    (value.to_bits() + 0x7fff + (value.to_bits() >> 16 & 1)) >> 16
}

/// What PTX's documentation says of `mma.m16n8k16`: row and column of the `i`-th value of a lane's fragment of the left operand, of the
/// right one, and of the sums.
fn places(lane: usize, i: usize) -> [(usize, usize); 3] {
    let (group, within) = (lane / 4, lane % 4);
    let left = (if i % 4 < 2 { group } else { group + 8 }, within * 2 + i % 2 + if i < 4 { 0 } else { 8 });
    let right = (within * 2 + i % 2 + if i < 2 { 0 } else { 8 }, group);
    [left, right, (if i < 2 { group } else { group + 8 }, within * 2 + i % 2)]
}

#[test]
fn warps_multiply_matrices_and_words_go_together() {
    // Small integers over 8: products and sums are exact.
    let value = |seed: usize, row: usize, column: usize| ((row * 31 + column * 17 + seed * 7) % 15) as f32 / 8.0 - 1.0;
    for seed in 0..8 {
        let half = |of: usize, warp: usize, (row, column)| bf16(value(seed + of + 50 * warp, row, column));
        let (mut a, mut b, mut sums, mut want) = (vec![], vec![], vec![], vec![]);
        for (warp, lane) in (0..64).map(|t| (t / 32, t % 32)) {
            let left = |i| half(0, warp, places(lane, i)[0]);
            let right = |i| half(1, warp, places(lane, i)[1]);
            a.extend((0..4).map(|r| left(2 * r) | left(2 * r + 1) << 16));
            b.extend((0..2).map(|r| right(2 * r) | right(2 * r + 1) << 16));
            for (row, column) in (0..4).map(|i| places(lane, i)[2]) {
                let seed = seed + 50 * warp;
                let products = (0..16).map(|k| value(seed, row, k) * value(seed + 1, k, column));
                sums.push(value(seed + 2, row, column));
                want.push(value(seed + 2, row, column) + products.sum::<f32>());
            }
        }
        let (a, b, sums) = (Buffer::new(&a), Buffer::new(&b), Buffer::new(&sums));
        let out = Buffer::new(&[0u32; 256]);
        run("matrices", 1, [a.address(), b.address(), sums.address(), out.address()], seed as u64).unwrap();
        assert_eq!(sums[..], want[..]);
        for t in 0..64 {
            let pair = bf16(want[4 * (63 - t)]) | bf16(want[4 * (63 - t) + 1]) << 16;
            assert_eq!(out[4 * t..4 * t + 4], [pair, 63 - t as u32, 0x8000_7fff, 7]);
        }
        let says = |result: Result<(), Finding>, words: &str| {
            let finding = result.expect_err(words).0;
            assert!(finding.contains(words), "{finding}");
        };
        assert_eq!(run("matrices_of_some", 1, [32], seed as u64), Ok(()));
        says(run("matrices_of_some", 1, [20], seed as u64), "mma.sync at selftest.cu");
        assert_eq!(run("misaligned_words", 1, [0], seed as u64), Ok(()));
        says(run("misaligned_words", 1, [2], seed as u64), "as 16 bytes: a misaligned access");
    }
}

#[test]
fn misuse_is_reported() {
    let out = Buffer::new(&[0u32; 64]);
    let at = out.address();
    let says = |result: Result<(), Finding>, words: &str| {
        let finding = result.expect_err(words).0;
        assert!(finding.contains(words), "{finding}");
    };
    for seed in 0..12 {
        assert_eq!(run("handed_on", 1, [at, 1], seed), Ok(()));
        says(run("handed_on", 1, [at, 0], seed), "values[");
        says(run("across_warps", 1, [at], seed), "values[");
        assert_eq!(run("different_barriers", 1, [1], seed), Ok(()));
        says(run("different_barriers", 1, [0], seed), "different barriers: selftest.cu:");
        says(run("barrier_without_some", 1, [], seed), "63 wait in __syncthreads at selftest.cu:");
        says(run("unlike_collectives", 1, [], seed), "threads wait for each other: 32 wait in __a");
        says(run("reads_an_outsider", 1, [], seed), "reads lane 20, which takes no part");
        says(run("too_much_shared", 1, [], seed), "49160 bytes of static shared memory");
        says(run("beyond_shared", 1, [128], seed), "words[128] is out of bounds: there are 128");
        says(run("touches", 1, [at, 64], seed), "thread 3: byte 256 of a buffer of 256 bytes");
        says(run("touches", 1, [at, (-1500i32) as u32 as u64], seed), "bytes before a buffer of 256 bytes");
        says(run("shifts_too_far", 1, [at, 32], seed), "undefined behaviour");
    }
    assert!(out.intact());
    assert_eq!(run("touches", 1, [at, (-1i32) as u32 as u64], 0), Ok(()));
    assert!(!out.intact(), "what is written before a buffer, on its page, is found afterwards");
    says(run("nothing", 1, [], 0), "nothing of selftest: no such kernel");
    says(run("touches", 1, [at], 0), "another number of arguments");
}
