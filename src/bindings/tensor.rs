//! Reads `NumPy` arrays and `DLPack` tensors as typed `ndarray` views; the only room that knows dtypes and devices.
//! An element with index `(i_1, ..., i_d)` lies at `data + itemsize sum_k i_k stride_k`.
//!
//! Nothing is copied and nothing is exported: Python allocates, kernels fill. A [`Tensor`] keeps its producer's memory
//! alive, so a view may be used for as long as the tensor it borrows from exists. Rust cannot see Python's other
//! references to that memory: as with every `NumPy` function, the caller promises that nobody writes to an input or
//! touches an output during a call. Outputs may be uninitialised, so their elements are `MaybeUninit`. [`distinct`] refuses arguments of one call that share memory with an output.

use dlpark::ffi::{DLDataType, DLDataTypeCode, DLDevice, DLDeviceType};
use dlpark::python::{ImportRequest, ImportedDlpack};
use dlpark::{DlpackFlags, tensor::TensorRef};
use half::{bf16, f16};
use ndarray::{ArrayViewD, ArrayViewMutD, Axis, IxDyn, ShapeBuilder};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use std::mem::MaybeUninit;

/// The element types kernels read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
}

/// A Rust type with a [`Dtype`].
pub trait HasDtype {
    const DTYPE: Dtype;
}

macro_rules! has_dtype {
    ($($t:ty => $d:ident),*) => {
        $(impl HasDtype for $t {
            const DTYPE: Dtype = Dtype::$d;
        })*
    };
}
has_dtype!(f64 => F64, f32 => F32, f16 => F16, bf16 => Bf16, i64 => I64, i32 => I32);

/// Host memory that belongs to Python, described.
pub struct Tensor<'py> {
    name: &'static str,
    data: *mut u8,
    shape: Vec<usize>,
    strides: Vec<isize>,
    dtype: Dtype,
    itemsize: usize,
    read_only: bool,
    _owner: Owner<'py>,
}

enum Owner<'py> {
    Numpy(#[expect(dead_code, reason = "kept alive")] Bound<'py, PyUntypedArray>),
    Dlpack(#[expect(dead_code, reason = "kept alive")] ImportedDlpack),
}

impl<'py> Tensor<'py> {
    /// Reads the description of an array or tensor; `name` is the argument's, for messages.
    pub fn import(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.cast::<PyUntypedArray>() {
            Self::from_numpy(name, array)
        } else {
            Self::from_dlpack(name, object)
        }
    }

    fn from_numpy(name: &'static str, array: &Bound<'py, PyUntypedArray>) -> PyResult<Self> {
        let descr = array.dtype();
        let native = descr.is_native_byteorder() != Some(false);
        let dtype = match (descr.kind(), descr.itemsize()) {
            (b'f', 8) if native => Some(Dtype::F64),
            (b'f', 4) if native => Some(Dtype::F32),
            (b'f', 2) if native => Some(Dtype::F16),
            (b'i', 8) if native => Some(Dtype::I64),
            (b'i', 4) if native => Some(Dtype::I32),
            (b'V', 2) if descr.typeobj().name()? == "bfloat16" => Some(Dtype::Bf16),
            _ => None,
        };
        let Some(dtype) = dtype else {
            return Err(unsupported_dtype(name, &descr.to_string()));
        };
        let itemsize = descr.itemsize();
        let mut strides = Vec::with_capacity(array.ndim());
        for &bytes in array.strides() {
            if bytes % itemsize as isize != 0 {
                return Err(unaligned(name));
            }
            strides.push(bytes / itemsize as isize);
        }
        // SAFETY: a live NumPy array object, whose fields may be read while the interpreter is held.
        let raw = unsafe { &*array.as_array_ptr() };
        let writeable = raw.fields.flags & numpy::npyffi::NPY_ARRAY_WRITEABLE != 0;
        Self::checked(Self {
            name,
            data: raw.fields.data.cast(),
            shape: array.shape().to_vec(),
            strides,
            dtype,
            itemsize,
            read_only: !writeable,
            _owner: Owner::Numpy(array.clone()),
        })
    }

    fn from_dlpack(name: &'static str, object: &Bound<'py, PyAny>) -> PyResult<Self> {
        let request = ImportRequest::new(object.as_borrowed())?;
        if let Ok(device) = request.device() {
            on_host(name, device)?;
        }
        let imported = match request.import(None, None) {
            // A producer from before DLPack 1.0 does not know the arguments of version negotiation.
            Err(error)
                if error.is_instance_of::<PyTypeError>(object.py()) && object.hasattr("__dlpack__")? =>
            {
                let capsule = object.call_method0("__dlpack__")?;
                ImportRequest::new(capsule.as_borrowed())?.import(None, None)?
            }
            Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
                return Err(PyTypeError::new_err(format!(
                    "{name} must be a NumPy array or a tensor that speaks DLPack, got {}",
                    object.get_type().name()?
                )));
            }
            imported => imported?,
        };
        let (data, shape, strides, dtype) = {
            let tensor = imported.validate().map_err(|error| invalid(name, &error))?;
            on_host(name, tensor.device())?;
            let dtype = dtype_of(tensor.dtype())
                .ok_or_else(|| unsupported_dtype(name, &dtype_name(tensor.dtype())))?;
            let strides = tensor.strides_or_compact().map_err(|error| invalid(name, &error))?;
            (
                address(name, &tensor)?,
                tensor.shape().iter().map(|&n| n as usize).collect(),
                strides.iter().map(|&s| s as isize).collect(),
                dtype,
            )
        };
        let read_only = imported.flags().contains(DlpackFlags::READ_ONLY);
        let itemsize = size_of_dtype(dtype);
        Self::checked(Self {
            name,
            data,
            shape,
            strides,
            dtype,
            itemsize,
            read_only,
            _owner: Owner::Dlpack(imported),
        })
    }

    /// Checks the address, and sets what producers may leave undefined: the strides of axes with fewer than two elements,
    /// and the address of a tensor without elements.
    fn checked(mut self) -> PyResult<Self> {
        let empty = self.shape.contains(&0);
        for (stride, &size) in self.strides.iter_mut().zip(&self.shape) {
            if empty || size == 1 {
                *stride = 0;
            }
        }
        if empty {
            self.data = std::ptr::without_provenance_mut(self.itemsize);
        } else if self.data.is_null() {
            return Err(PyValueError::new_err(format!(
                "{} has no data: it is a fake or meta tensor",
                self.name
            )));
        }
        if !self.data.addr().is_multiple_of(self.itemsize) {
            return Err(unaligned(self.name));
        }
        Ok(self)
    }

    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Whether the other is the very same tensor: the same elements at the same addresses.
    pub fn is(&self, other: &Self) -> bool {
        self.data == other.data
            && self.dtype == other.dtype
            && self.shape == other.shape
            && self.strides == other.strides
    }

    /// A view of the elements.
    pub fn view<T: HasDtype>(&self) -> PyResult<ArrayViewD<'_, T>> {
        if T::DTYPE != self.dtype {
            return Err(PyTypeError::new_err(format!(
                "{} must be {:?}, got {:?}",
                self.name,
                T::DTYPE,
                self.dtype
            )));
        }
        let steps: Vec<usize> = self.strides.iter().map(|s| s.unsigned_abs()).collect();
        let mut first = self.data.cast::<T>();
        for (&stride, &size) in self.strides.iter().zip(&self.shape) {
            if stride < 0 {
                first = first.wrapping_offset(stride * (size as isize - 1));
            }
        }
        // SAFETY: the producer vouches for its description, `checked` for the address and its alignment; `first` is the
        // lowest element, from which axes of negative stride are then turned around.
        let mut view =
            unsafe { ArrayViewD::from_shape_ptr(IxDyn(&self.shape).strides(IxDyn(&steps)), first) };
        for (axis, &stride) in self.strides.iter().enumerate() {
            if stride < 0 {
                view.invert_axis(Axis(axis));
            }
        }
        Ok(view)
    }

    /// A view of an output's elements.
    pub fn view_mut<T: HasDtype>(&mut self) -> PyResult<ArrayViewMutD<'_, MaybeUninit<T>>> {
        if self.read_only {
            return Err(PyValueError::new_err(format!(
                "{} is read-only: give an array that may be written",
                self.name
            )));
        }
        if T::DTYPE != self.dtype {
            return Err(PyTypeError::new_err(format!(
                "{} must be {:?}, got {:?}",
                self.name,
                T::DTYPE,
                self.dtype
            )));
        }
        let mut axes: Vec<(usize, usize)> = Vec::with_capacity(self.shape.len());
        for (&stride, &size) in self.strides.iter().zip(&self.shape) {
            if stride < 0 {
                return Err(PyValueError::new_err(format!("{} must not have a negative stride", self.name)));
            }
            if size > 1 && !self.shape.contains(&0) {
                axes.push((stride as usize, size));
            }
        }
        axes.sort_unstable();
        let mut extent = 1;
        for (stride, size) in axes {
            if stride < extent {
                return Err(PyValueError::new_err(format!("{} must not overlap itself", self.name)));
            }
            extent = stride * size;
        }
        let steps: Vec<usize> = self.strides.iter().map(|&s| s as usize).collect();
        let first = self.data.cast::<MaybeUninit<T>>();
        // SAFETY: as in `view`; no two indices share an element, as just checked, and `distinct` has seen to it that no
        // other argument does.
        Ok(unsafe { ArrayViewMutD::from_shape_ptr(IxDyn(&self.shape).strides(IxDyn(&steps)), first) })
    }

    /// The elements of an output that lies in memory in row-major order.
    pub fn slice_mut<T: HasDtype>(&mut self) -> PyResult<&mut [MaybeUninit<T>]> {
        let name = self.name;
        self.view_mut()?
            .into_slice()
            .ok_or_else(|| PyValueError::new_err(format!("{name} must be contiguous")))
    }

    /// The elements of an input that lies in memory in row-major order.
    pub fn slice<T: HasDtype>(&self) -> PyResult<&[T]> {
        self.view()?
            .to_slice()
            .ok_or_else(|| PyValueError::new_err(format!("{} must be contiguous", self.name)))
    }

    /// The lowest address and the one past the highest.
    fn span(&self) -> (usize, usize) {
        let (mut low, mut high) = (0, 0);
        if self.shape.contains(&0) {
            return (0, 0);
        }
        for (&stride, &size) in self.strides.iter().zip(&self.shape) {
            let reach = stride * (size as isize - 1);
            if reach < 0 {
                low += reach;
            } else {
                high += reach;
            }
        }
        let size = self.itemsize as isize;
        let address = self.data.addr() as isize;
        ((address + low * size) as usize, (address + (high + 1) * size) as usize)
    }
}

/// Refuses outputs that share memory with each other or with an input.
pub fn distinct(outputs: &[&Tensor], inputs: &[&Tensor]) -> PyResult<()> {
    for (i, output) in outputs.iter().enumerate() {
        let (low, high) = output.span();
        for other in outputs[i + 1..].iter().chain(inputs) {
            let (other_low, other_high) = other.span();
            if low < other_high && other_low < high {
                return Err(PyValueError::new_err(format!(
                    "{} and {} must not share memory",
                    output.name, other.name
                )));
            }
        }
    }
    Ok(())
}

fn address(name: &str, tensor: &TensorRef) -> PyResult<*mut u8> {
    let data = tensor.data_ptr().cast_mut().cast::<u8>();
    let offset = usize::try_from(tensor.byte_offset()).map_err(|error| invalid(name, &error))?;
    Ok(data.wrapping_add(offset))
}

fn dtype_of(dtype: DLDataType) -> Option<Dtype> {
    if dtype.lanes != 1 {
        return None;
    }
    match (dtype.code, dtype.bits) {
        (DLDataTypeCode::FLOAT, 64) => Some(Dtype::F64),
        (DLDataTypeCode::FLOAT, 32) => Some(Dtype::F32),
        (DLDataTypeCode::FLOAT, 16) => Some(Dtype::F16),
        (DLDataTypeCode::BFLOAT, 16) => Some(Dtype::Bf16),
        (DLDataTypeCode::INT, 64) => Some(Dtype::I64),
        (DLDataTypeCode::INT, 32) => Some(Dtype::I32),
        _ => None,
    }
}

fn size_of_dtype(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 | Dtype::I64 => 8,
        Dtype::F32 | Dtype::I32 => 4,
        Dtype::F16 | Dtype::Bf16 => 2,
    }
}

fn dtype_name(dtype: DLDataType) -> String {
    let kind = match dtype.code {
        DLDataTypeCode::INT => "int",
        DLDataTypeCode::UINT => "uint",
        DLDataTypeCode::FLOAT => "float",
        DLDataTypeCode::BFLOAT => "bfloat",
        DLDataTypeCode::COMPLEX => "complex",
        DLDataTypeCode::BOOL => return "bool".into(),
        _ => return format!("DLPack type {} of {} bits", dtype.code.0, dtype.bits),
    };
    format!("{kind}{}", dtype.bits)
}

fn on_host(name: &str, device: DLDevice) -> PyResult<()> {
    let kind = match device.device_type {
        DLDeviceType::CPU | DLDeviceType::CUDAHOST | DLDeviceType::ROCMHOST => return Ok(()),
        DLDeviceType::CUDA | DLDeviceType::CUDAMANAGED => "cuda".to_owned(),
        DLDeviceType::ROCM => "rocm".to_owned(),
        DLDeviceType::METAL => "mps".to_owned(),
        other => format!("DLPack type {}", other.0),
    };
    Err(PyValueError::new_err(format!(
        "{name} is on device {kind}:{}, and the Rust kernels serve the CPU: move it there first",
        device.device_id
    )))
}

fn unsupported_dtype(name: &str, dtype: &str) -> PyErr {
    PyTypeError::new_err(format!("{name} has dtype {dtype}, which the kernels do not serve"))
}

fn unaligned(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name} is not aligned to its elements: give a copy of it"))
}

fn invalid(name: &str, error: &dyn std::fmt::Display) -> PyErr {
    PyBufferError::new_err(format!("{name} is no valid DLPack tensor: {error}"))
}
