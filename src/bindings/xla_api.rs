//! The part of `xla/ffi/api/c_api.h` (shipped with jaxlib) that a handler needs, in version 0.1, which all later
//! versions of the interface support.

use std::ffi::{c_char, c_int, c_void};
use std::mem::{offset_of, size_of};
#[cfg(test)]
use std::ptr::{null, null_mut};

#[repr(C)]
pub(super) struct Extension {
    pub(super) struct_size: usize,
    pub(super) kind: c_int,
    pub(super) next: *mut Extension,
}

pub(super) const METADATA: c_int = 1;

#[repr(C)]
pub(super) struct ApiVersion {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) major: c_int,
    pub(super) minor: c_int,
}

#[repr(C)]
pub(super) struct Metadata {
    pub(super) struct_size: usize,
    pub(super) api_version: ApiVersion,
    pub(super) traits: u32,
}

#[repr(C)]
pub(super) struct MetadataExtension {
    pub(super) base: Extension,
    pub(super) metadata: *mut Metadata,
}

/// An error that XLA creates and owns.
pub(super) enum XlaError {}

#[repr(C)]
pub(super) struct ErrorCreateArgs {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) message: *const c_char,
    pub(super) code: c_int,
}

pub(super) const INVALID_ARGUMENT: c_int = 3;
pub(super) const RESOURCE_EXHAUSTED: c_int = 8;
pub(super) const INTERNAL: c_int = 13;

#[repr(C)]
pub(super) struct ScheduleArgs {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) context: *mut c_void,
    pub(super) task: unsafe extern "C" fn(*mut c_void),
    pub(super) data: *mut c_void,
}

#[repr(C)]
pub(super) struct NumThreadsArgs {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) context: *mut c_void,
    pub(super) num_threads: *mut i64,
}

#[repr(C)]
pub(super) struct ErrorDestroyArgs {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) error: *mut XlaError,
}

/// The first fields of `XLA_FFI_Api`. Later versions add fields at its end only.
#[repr(C)]
pub(super) struct Api {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) version: ApiVersion,
    pub(super) internal: *const c_void,
    pub(super) error_create: Option<unsafe extern "C" fn(*mut ErrorCreateArgs) -> *mut XlaError>,
    pub(super) error_get_message: *const c_void,
    pub(super) error_destroy: Option<unsafe extern "C" fn(*mut ErrorDestroyArgs)>,
    /// Handlers, streams, types, contexts, states and memory of devices.
    pub(super) others: [*const c_void; 8],
    pub(super) schedule: Option<unsafe extern "C" fn(*mut ScheduleArgs) -> *mut XlaError>,
    pub(super) num_threads: Option<unsafe extern "C" fn(*mut NumThreadsArgs) -> *mut XlaError>,
}

/// `XLA_FFI_Args` and `XLA_FFI_Rets`.
#[repr(C)]
pub(super) struct Buffers {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) size: i64,
    pub(super) kinds: *const c_int,
    pub(super) data: *const *const Buffer,
}

#[repr(C)]
pub(super) struct Buffer {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) dtype: c_int,
    pub(super) data: *mut c_void,
    pub(super) rank: i64,
    pub(super) dims: *const i64,
}

#[repr(C)]
pub(super) struct Attributes {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) size: i64,
    pub(super) kinds: *const c_int,
    pub(super) names: *const *const ByteSpan,
    pub(super) values: *const *const c_void,
}

/// A string, without a zero at its end.
#[repr(C)]
pub(super) struct ByteSpan {
    pub(super) data: *const u8,
    pub(super) size: usize,
}

impl ByteSpan {
    /// # Safety
    /// The span is XLA's and outlives `'a`.
    pub(super) unsafe fn bytes<'a>(&self) -> &'a [u8] {
        if self.size == 0 {
            return &[];
        }
        // SAFETY: what the caller promises.
        unsafe { std::slice::from_raw_parts(self.data, self.size) }
    }
}

/// `XLA_FFI_CallFrame` without its later field `future`.
#[repr(C)]
pub(super) struct CallFrame {
    pub(super) struct_size: usize,
    pub(super) extensions: *mut Extension,
    pub(super) api: *const Api,
    pub(super) context: *mut c_void,
    pub(super) stage: c_int,
    pub(super) args: Buffers,
    pub(super) rets: Buffers,
    pub(super) attributes: Attributes,
}

const _: () = {
    assert!(size_of::<*const ()>() == 8, "laid out for 64-bit platforms");
    assert!(size_of::<Extension>() == 24);
    assert!(size_of::<ApiVersion>() == 24);
    assert!(offset_of!(Metadata, traits) == 32);
    assert!(size_of::<MetadataExtension>() == 32);
    assert!(size_of::<ErrorCreateArgs>() == 32);
    assert!(offset_of!(Api, error_create) == 48);
    assert!(offset_of!(Api, error_destroy) == 64);
    assert!(offset_of!(Api, num_threads) == 144);
    assert!(size_of::<ScheduleArgs>() == 40);
    assert!(size_of::<NumThreadsArgs>() == 32);
    assert!(size_of::<ErrorDestroyArgs>() == 24);
    assert!(size_of::<Buffers>() == 40);
    assert!(size_of::<Buffer>() == 48);
    assert!(size_of::<Attributes>() == 48);
    assert!(size_of::<ByteSpan>() == 16);
    assert!(size_of::<CallFrame>() == 40 + 2 * 40 + 48);
};

/// The kind of a string attribute.
pub(super) const STRING: c_int = 4;

/// The data type of a signed integer of 32 bits.
pub(super) const S32: c_int = 4;
pub(super) const F16: c_int = 10;
pub(super) const F32: c_int = 11;
pub(super) const F64: c_int = 12;
pub(super) const BF16: c_int = 16;

#[cfg(test)]
impl Api {
    /// A table without functions.
    pub(super) fn empty() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            extensions: null_mut(),
            version: ApiVersion { struct_size: 24, extensions: null_mut(), major: 0, minor: 1 },
            internal: null(),
            error_create: None,
            error_get_message: null(),
            error_destroy: None,
            others: [null(); 8],
            schedule: None,
            num_threads: None,
        }
    }
}
