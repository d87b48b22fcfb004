//! Values on the command line.

use crate::blk::SERIAL_BYTES;

/// A size in bytes, as `512M` or `10G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

/// CPUs, as `2,4-7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

/// The largest CPU number that can be bound to.
const MAX_CPU: usize = 1023;

pub(super) fn size(text: &str) -> Result<Size, String> {
    let wrong = || format!("'{text}' is no size: a number with K, M, G or T, as 512M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|error| format!("{}: {error}", wrong()))?;
    let bytes = number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("'{text}' is too large"))?;
    if bytes < 512 {
        return Err(format!(
            "'{text}' is too small: a device has at least one sector, 512 bytes"
        ));
    }
    Ok(Size(bytes))
}

pub(super) fn cpu_list(text: &str) -> Result<CpuList, String> {
    let number = |text: &str| {
        text.parse::<usize>()
            .ok()
            .filter(|cpu| *cpu <= MAX_CPU)
            .ok_or_else(|| format!("'{text}' is no CPU: a list is written as 2,4-7"))
    };
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!(
                "'{part}' is no range of CPUs: the first is the smaller one"
            ));
        }
        cpus.extend(first..=last);
    }
    Ok(CpuList(cpus))
}

pub(super) fn serial(text: &str) -> Result<String, String> {
    if text.len() <= SERIAL_BYTES && text.bytes().all(|c| (b' '..=b'~').contains(&c)) {
        Ok(text.to_owned())
    } else {
        Err(format!("at most {SERIAL_BYTES} printable ASCII characters"))
    }
}

pub(super) fn block_size(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|size: &u32| size.is_power_of_two() && (512..=65536).contains(size))
        .ok_or_else(|| format!("'{text}' is no block size: a power of two from 512 to 65536"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("512"), Ok(Size(512)));
        assert_eq!(size("4k"), Ok(Size(4096)));
        assert_eq!(size("512M"), Ok(Size(512 << 20)));
        assert_eq!(size("10G"), Ok(Size(10 << 30)));
        assert_eq!(size("2TiB"), Ok(Size(2 << 40)));
        for wrong in [
            "",
            "G",
            "1X",
            "-1G",
            "1.5G",
            "511",
            "0",
            "99999999999T",
            "1 G",
            "１G",
        ] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("0"), Ok(CpuList(vec![0])));
        assert_eq!(cpu_list("2,4-6"), Ok(CpuList(vec![2, 4, 5, 6])));
        for wrong in ["", "a", "1-", "-1", "3-2", "1,,2", "99999999"] {
            assert!(cpu_list(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn block_sizes() {
        assert_eq!(block_size("512"), Ok(512));
        assert_eq!(block_size("65536"), Ok(65536));
        for wrong in ["0", "256", "1000", "131072", "x"] {
            assert!(block_size(wrong).is_err(), "{wrong}");
        }
    }
}
