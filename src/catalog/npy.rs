//! NumPy's `.npy`: two-dimensional, C order, little-endian f32 or f16, format versions 1 to 3.

use std::path::Path;

use half::f16;

use super::CatalogError;
use super::array::Array;
use super::generation::{Matrix, MatrixData};

/// Largest dimension.
pub const MAX_DIM: usize = 8192;

/// Reads a matrix and checks that it has `n_rows` rows and only finite values.
///
/// # Errors
/// Names the file, and the row of a NaN or infinity.
pub fn read(path: &Path, n_rows: usize, rows_of: &str) -> Result<Matrix, CatalogError> {
    let bytes = std::fs::read(path).map_err(|e| CatalogError::io(path, e))?;
    parse(&bytes, path, n_rows, rows_of)
}

/// As [`read`], of a file's `bytes`; `path` is for messages only. Nothing is allocated that `bytes` is not as long as.
///
/// # Errors
/// As [`read`].
pub fn parse(bytes: &[u8], path: &Path, n_rows: usize, rows_of: &str) -> Result<Matrix, CatalogError> {
    let wrong = |reason: String| CatalogError::file(path, reason);
    let (header, data) = split_header(bytes).ok_or_else(|| wrong("not an .npy file, or its header is cut".into()))?;
    let half = match dictionary_value(header, "descr") {
        Some("'<f4'") => false,
        Some("'<f2'") => true,
        other => return Err(wrong(format!("dtype is {}, expected '<f4' or '<f2'", other.unwrap_or("missing")))),
    };
    if dictionary_value(header, "fortran_order") != Some("False") {
        return Err(wrong("Fortran order; save it in C order".into()));
    }
    let shape = dictionary_value(header, "shape").unwrap_or("missing");
    let Some((rows, dim)) = two_numbers(shape) else {
        return Err(wrong(format!("shape is {shape}, expected (rows, dim)")));
    };
    if rows != n_rows {
        return Err(wrong(format!("{rows} rows, but {rows_of} has {n_rows}")));
    }
    if dim == 0 || dim > MAX_DIM {
        return Err(wrong(format!("dim is {dim}, expected 1 to {MAX_DIM}")));
    }
    let width = if half { 2 } else { 4 };
    let want = rows.checked_mul(dim).and_then(|n| n.checked_mul(width));
    if want != Some(data.len()) {
        return Err(wrong(format!("{} bytes of data, expected {rows} x {dim} x {width}; cut?", data.len())));
    }
    let not_finite = |at: usize| CatalogError::Row {
        file: path.into(),
        row: at / dim,
        column: format!("[{}]", at % dim),
        reason: "not a finite number".into(),
    };
    let data = if half {
        let values: Vec<f16> = data.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect();
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(not_finite(at));
        }
        MatrixData::F16(Array::from(values))
    } else {
        let values: Vec<f32> = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(not_finite(at));
        }
        MatrixData::F32(Array::from(values))
    };
    Ok(Matrix { dim, data })
}

/// Writes f32 `[values.len() / dim, dim]`.
///
/// # Errors
/// Those of the file system.
pub fn write_f32(path: &Path, values: &[f32], dim: usize) -> std::io::Result<()> {
    let dictionary =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {dim}), }}", values.len() / dim.max(1));
    // Magic, version and length take 10 bytes; the data begins at a multiple of 64.
    let padded = (10 + dictionary.len() + 1).next_multiple_of(64) - 10;
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend_from_slice(&(padded as u16).to_le_bytes());
    bytes.extend_from_slice(format!("{dictionary:<width$}\n", width = padded - 1).as_bytes());
    bytes.extend_from_slice(bytemuck::cast_slice(values));
    std::fs::write(path, bytes)
}

fn split_header(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let rest = bytes.strip_prefix(b"\x93NUMPY")?;
    let (len, start): (usize, usize) = match *rest.first()? {
        1 => (usize::from(u16::from_le_bytes(rest.get(2..4)?.try_into().ok()?)), 4),
        2 | 3 => (u32::from_le_bytes(rest.get(2..6)?.try_into().ok()?) as usize, 6),
        _ => return None,
    };
    let header = rest.get(start..start.checked_add(len)?)?;
    Some((std::str::from_utf8(header).ok()?, &rest[start + len..]))
}

/// `(rows, dim)`, as Python writes a tuple.
fn two_numbers(tuple: &str) -> Option<(usize, usize)> {
    let (rows, dim) = tuple.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    let dim = dim.trim();
    Some((rows.trim().parse().ok()?, dim.strip_suffix(',').unwrap_or(dim).trim().parse().ok()?))
}

/// The text of a value in the header's Python dictionary; tuples include their parentheses.
fn dictionary_value<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let at = header.find(&format!("'{key}'"))? + key.len() + 2;
    let rest = header[at..].trim_start().strip_prefix(':')?.trim_start();
    let end = if rest.starts_with('(') { rest.find(')')? + 1 } else { rest.find([',', '}'])? };
    Some(rest[..end].trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(values: &[f32], dim: usize) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.npy");
        write_f32(&path, values, dim).unwrap();
        (dir, path)
    }

    #[test]
    fn round_trip() {
        let (_dir, path) = written(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3);
        let matrix = read(&path, 2, "items").unwrap();
        assert_eq!((matrix.dim, matrix.n_rows()), (3, 2));
        let mut row = Vec::new();
        matrix.extend_row(1, &mut row);
        assert_eq!(row, [4.0, 5.0, 6.0]);
    }

    #[test]
    fn nan_names_row_and_column() {
        let (_dir, path) = written(&[1.0, 2.0, f32::NAN, 4.0], 2);
        let error = read(&path, 2, "items").unwrap_err();
        assert!(matches!(error, CatalogError::Row { row: 1, ref column, .. } if column == "[0]"), "{error}");
    }

    #[test]
    fn shapes() {
        assert_eq!(two_numbers("(3, 4)"), Some((3, 4)));
        assert_eq!(two_numbers("(3,4,)"), Some((3, 4)));
        for tuple in ["(3,)", "(3)", "()", "(3, 4, 5)", "(3, x, 4)", "(-3, 4)", "(3, 99999999999999999999)", "3, 4"] {
            assert_eq!(two_numbers(tuple), None, "{tuple}");
        }
    }

    #[test]
    fn wrong_rows_and_truncation_are_refused() {
        let (_dir, path) = written(&[1.0; 8], 2);
        assert!(read(&path, 3, "items.parquet").unwrap_err().to_string().contains("4 rows, but items.parquet has 3"));
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(read(&path, 4, "items").is_err(), "{len} bytes were accepted");
        }
    }
}
