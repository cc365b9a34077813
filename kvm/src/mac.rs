//! MAC addresses that follow from what they belong to: the same lab, node and NIC always get the same address, and no two NICs of a plan share one.

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// The prefix QEMU itself uses for guests: locally administered (bit 1 of the first octet), unicast (bit 0 clear).
const PREFIX: [u8; 3] = [0x52, 0x54, 0x00];

/// How many addresses one plan may ask for. Far above any lab, far below the 2^24 addresses of the prefix, so that resolving collisions always ends quickly.
const MAX_NICS: usize = 4096;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// Why a text is no MAC address, or why addresses could not be given out.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MacError {
    /// Not six two-digit hexadecimal octets between colons.
    #[error("not a MAC address (six hexadecimal octets between colons): {0:?}")]
    Malformed(String),
    /// More NICs than one plan may have.
    #[error("{asked} NICs in one plan, at most {MAX_NICS} can be addressed")]
    TooMany {
        /// How many were asked for.
        asked: usize,
    },
}

impl Mac {
    /// An address from its six octets.
    #[must_use]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The six octets, first on the wire first.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// The address of the NIC `nic` of the node `node` of the lab `lab`: always the same for the same three names.
    ///
    /// Two different NICs can meet on one address (24 bits are hashed); [`Mac::derive_unique`] gives out a whole plan's addresses without that.
    #[must_use]
    pub fn derive(lab: &str, node: &str, nic: &str) -> Self {
        Self::derive_with_attempt(lab, node, nic, 0)
    }

    /// The addresses of all NICs of a plan, in their order, each `(lab, node, nic)`.
    ///
    /// Each is [`Mac::derive`]'s unless an earlier NIC of the list has that address already; then the next attempt's hash is taken. So no two are equal.
    ///
    /// # Errors
    /// [`MacError::TooMany`] where the list is longer than 4096.
    pub fn derive_unique<'a, I>(nics: I) -> Result<Vec<Self>, MacError>
    where
        I: IntoIterator<Item = (&'a str, &'a str, &'a str)>,
    {
        unique(nics, Self::derive_with_attempt)
    }

    fn derive_with_attempt(lab: &str, node: &str, nic: &str, attempt: u32) -> Self {
        let mut hash = Sha256::new();
        for part in [lab, node, nic] {
            // The length before each part keeps ("ab", "c") and ("a", "bc") apart.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        hash.update(attempt.to_le_bytes());
        let digest = hash.finalize();
        Self([PREFIX[0], PREFIX[1], PREFIX[2], digest[0], digest[1], digest[2]])
    }
}

fn unique<'a, I>(nics: I, derive: impl Fn(&str, &str, &str, u32) -> Mac) -> Result<Vec<Mac>, MacError>
where
    I: IntoIterator<Item = (&'a str, &'a str, &'a str)>,
{
    let nics: Vec<_> = nics.into_iter().collect();
    if nics.len() > MAX_NICS {
        return Err(MacError::TooMany { asked: nics.len() });
    }
    let mut taken = HashSet::with_capacity(nics.len());
    let mut given = Vec::with_capacity(nics.len());
    for (lab, node, nic) in nics {
        // At most MAX_NICS of 2^24 addresses are taken: that 64 attempts in a row all hit one is impossible in practice (4096/2^24)^64, and bounded in any case.
        let free = (0..64).map(|attempt| derive(lab, node, nic, attempt)).find(|mac| !taken.contains(mac));
        let Some(mac) = free else {
            return Err(MacError::TooMany { asked: taken.len() + 1 });
        };
        taken.insert(mac);
        given.push(mac);
    }
    Ok(given)
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let malformed = || MacError::Malformed(text.chars().take(40).collect());
        let mut octets = [0u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(malformed)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        Ok(Self(octets))
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_addresses_are_stable_local_and_unicast() {
        let mac = Mac::derive("lab", "server-1", "eth1");
        assert_eq!(mac, Mac::derive("lab", "server-1", "eth1"));
        assert_eq!(mac.octets()[0] & 0b11, 0b10, "locally administered, unicast");
        assert!(mac.to_string().starts_with("52:54:00:"));
    }

    #[test]
    fn every_part_counts_and_parts_do_not_run_together() {
        let base = Mac::derive("lab", "ab", "c");
        assert_ne!(base, Mac::derive("lab2", "ab", "c"));
        assert_ne!(base, Mac::derive("lab", "a", "bc"));
        assert_ne!(base, Mac::derive("lab", "ab", "d"));
    }

    #[test]
    fn a_plan_never_has_one_address_twice_even_if_all_hashes_meet() {
        let nodes: Vec<String> = (0..9).map(|n| format!("server-{n}")).collect();
        let nics: Vec<_> =
            nodes.iter().flat_map(|n| ["eth0", "eth1", "eth2"].map(|nic| ("lab", n.as_str(), nic))).collect();
        // A hash with four values only on the first attempts: nearly every NIC collides at first.
        let poor = |lab: &str, node: &str, nic: &str, attempt: u32| {
            let good = Mac::derive_with_attempt(lab, node, nic, attempt).octets();
            if attempt < 2 { Mac::new([0x52, 0x54, 0, 0, 0, good[5] % 4]) } else { Mac::new(good) }
        };
        let macs = unique(nics.clone(), poor).unwrap();
        assert_eq!(macs.len(), 27);
        assert_eq!(macs.iter().collect::<HashSet<_>>().len(), 27);
        let plain = Mac::derive_unique(nics).unwrap();
        assert_eq!(plain[0], Mac::derive("lab", "server-0", "eth0"));
    }

    #[test]
    fn one_nic_named_twice_gets_two_addresses() {
        let macs = Mac::derive_unique([("l", "n", "e"), ("l", "n", "e")]).unwrap();
        assert_ne!(macs[0], macs[1]);
    }

    #[test]
    fn too_many_nics_are_refused() {
        let nics = std::iter::repeat_n(("l", "n", "e"), MAX_NICS + 1);
        assert_eq!(Mac::derive_unique(nics), Err(MacError::TooMany { asked: MAX_NICS + 1 }));
    }

    #[test]
    fn text_round_trip_and_refusals() {
        let mac = Mac::derive("lab", "n", "eth0");
        assert_eq!(mac.to_string().parse::<Mac>().unwrap(), mac);
        let json = serde_json::to_string(&mac).unwrap();
        assert_eq!(serde_json::from_str::<Mac>(&json).unwrap(), mac);
        for bad in [
            "",
            "52:54:00:00:00",
            "52:54:00:00:00:00:00",
            "52-54-00-00-00-00",
            "5:54:00:00:00:000",
            "+2:54:00:00:00:00",
            "é:54:00:00:00:00",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
