//! What the operator says of every injected sidecar.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

/// For all injected pods; annotations of a pod come before where they say something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InjectSettings {
    /// Of the sidecar's container.
    pub image: String,
    /// Of the container that makes the rules: has `nft` and `ip` beside the program.
    pub capture_image: String,
    /// Where pods reach a federator, `HOST:PORT`; resolved by the sidecar.
    pub federator: String,
    pub requests: Quantities,
    pub limits: Quantities,
}

/// Amounts of resources by name, as Kubernetes writes them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Quantities(BTreeMap<String, String>);

impl Quantities {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn to_value(&self) -> Value {
        Value::Object(
            self.0.iter().map(|(name, amount)| (name.clone(), amount.as_str().into())).collect::<Map<_, _>>(),
        )
    }

    /// These, and of `others` what is not named here.
    pub fn over(&self, others: &Self) -> Self {
        let mut all = others.0.clone();
        all.extend(self.0.clone());
        Self(all)
    }
}

/// What is wrong with a list of amounts.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not cpu=AMOUNT or memory=AMOUNT: write it as cpu=10m,memory=32Mi")]
pub struct QuantityError(String);

impl FromStr for Quantities {
    type Err = QuantityError;
    /// `cpu=10m,memory=32Mi`; an empty text names nothing.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let read = |part: &str| {
            let wrong = || QuantityError(part.chars().take(100).collect());
            let (name, amount) = part.split_once('=').ok_or_else(wrong)?;
            let known = matches!(name, "cpu" | "memory" | "ephemeral-storage");
            if known && is_amount(amount) { Ok((name.to_owned(), amount.to_owned())) } else { Err(wrong()) }
        };
        Ok(Self(parts.map(read).collect::<Result<_, _>>()?))
    }
}

impl fmt::Display for Quantities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(|(name, amount)| format!("{name}={amount}")).collect();
        f.write_str(&parts.join(","))
    }
}

/// A quantity of Kubernetes without exponents: `10m`, `0.5`, `32Mi`.
fn is_amount(text: &str) -> bool {
    let number: String = text.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
    let unit = text.get(number.len()..).unwrap_or_default();
    let units = ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"];
    text.len() <= 20
        && number.starts_with(|c: char| c.is_ascii_digit())
        && number.parse::<f64>().is_ok()
        && units.contains(&unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_kubernetes_writes_them_and_others_are_named() {
        let read: Quantities = "cpu=10m, memory=32Mi".parse().unwrap();
        assert_eq!(read.to_string(), "cpu=10m,memory=32Mi");
        assert_eq!("".parse::<Quantities>().unwrap(), Quantities::default());
        assert_eq!("cpu=2".parse::<Quantities>().unwrap().over(&read).to_string(), "cpu=2,memory=32Mi");
        for bad in ["cpu", "cpu=", "cpu=m", "gpu=1", "memory=1e3", "memory=-1", "cpu=.5", "cpu=1;rm"] {
            assert!(bad.parse::<Quantities>().unwrap_err().to_string().contains(bad), "{bad}");
        }
    }
}
