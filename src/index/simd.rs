//! Which instruction set the kernels over codes use, chosen at run time.

/// An instruction set. The variants are made by [`Simd::available`] only, so that a kernel that is given one may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Simd {
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// Whatever the target has.
    Portable,
}

impl Simd {
    /// The best that this CPU has.
    pub fn detect() -> Self {
        Self::available()[0]
    }

    /// All that this CPU has, best first.
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if avx512 && avx2 {
                all.push(Simd::Avx512);
            }
            if avx2 {
                all.push(Simd::Avx2);
            }
        }
        all.push(Simd::Portable);
        all
    }
}

/// Defines a function from one generic body, compiled for each instruction set and dispatched by its first argument. The body
/// is plain code that the compiler vectorises for what it is compiled for.
macro_rules! for_each_simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        $vis fn $name(simd: $crate::index::simd::Simd, $($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
            fn avx512($($arg: $type),*) $(-> $ret)? {
                $body::<true>($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $ret)? {
                $body::<true>($($arg),*)
            }
            #[allow(unsafe_code)] // Calls of functions compiled for CPU features that were detected.
            match simd {
                // SAFETY: `Simd` has this variant only where the features were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::index::simd::Simd::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::index::simd::Simd::Avx2 => unsafe { avx2($($arg),*) },
                _ => $body::<false>($($arg),*),
            }
        }
    };
}
pub(crate) use for_each_simd;

/// `a * b + c`: fused where the CPU can, which is what `FUSED` says.
#[inline(always)]
pub(crate) fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}
