//! One choice of instruction set, made at run time.
//!
//! A kernel is ordinary Rust over short arrays of lanes. [`dispatch`] compiles it once per instruction set, inside a
//! function with that set's `#[target_feature]`s, so that the compiler turns the lane loops into vector instructions,
//! and picks the widest that the processor has. AVX2 and AVX-512 have the same lanes and both fuse multiplication and
//! addition, so they give the same bits.

/// Lanes of one step of a kernel, for every element type.
pub const LANES: usize = 16;

/// An instruction set, as far as arithmetic depends on it.
pub trait Isa: Copy {
    /// Whether `a * b + c` is one instruction.
    const FMA: bool;
}

/// A float that can be multiplied and added in one instruction.
pub trait MulAdd: Sized {
    /// `self * a + b`, rounded once where the instruction set can.
    #[must_use]
    fn mul_add<I: Isa>(self, a: Self, b: Self) -> Self;
}

macro_rules! mul_add {
    ($($t:ident)*) => {
        $(impl MulAdd for $t {
            #[inline(always)]
            fn mul_add<I: Isa>(self, a: Self, b: Self) -> Self {
                if I::FMA { $t::mul_add(self, a, b) } else { self * a + b }
            }
        })*
    };
}
mul_add!(f32 f64);

/// A computation that [`dispatch`] compiles for each instruction set. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// The computation.
    fn run<I: Isa>(self) -> Self::Output;
}

#[derive(Clone, Copy)]
pub(super) struct Fused;

impl Isa for Fused {
    const FMA: bool = true;
}

#[cfg(not(target_arch = "aarch64"))]
#[derive(Clone, Copy)]
pub(super) struct Baseline;

#[cfg(not(target_arch = "aarch64"))]
impl Isa for Baseline {
    const FMA: bool = false;
}

/// Runs a kernel with the widest instruction set this processor has.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn avx512<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<Fused>()
        }
        #[target_feature(enable = "avx2,fma,f16c")]
        fn avx2<K: Kernel>(kernel: K) -> K::Output {
            kernel.run::<Fused>()
        }
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                // SAFETY: the processor was just asked for every feature the function enables.
                return unsafe { avx512(kernel) };
            }
            // SAFETY: as above.
            return unsafe { avx2(kernel) };
        }
        kernel.run::<Baseline>()
    }
    // NEON and its fused multiply-add are part of every aarch64 target.
    #[cfg(target_arch = "aarch64")]
    {
        kernel.run::<Fused>()
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        kernel.run::<Baseline>()
    }
}
