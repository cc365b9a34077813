//! Just enough DER to read the subject of a certificate this program (or a CA of it) made.

/// Common name and organisations of a subject.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) cn: String,
    pub(crate) orgs: Vec<String>,
}

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OID: u8 = 0x06;
const EXPLICIT_0: u8 = 0xa0;
const OID_CN: &[u8] = &[0x55, 0x04, 0x03];
const OID_O: &[u8] = &[0x55, 0x04, 0x0a];

/// Splits one element off: its tag, its content, what follows.
fn element(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = input.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let count = usize::from(first & 0x7f);
        if count == 0 || count > 4 || rest.len() < count {
            return None;
        }
        let (bytes, rest) = rest.split_at(count);
        (bytes.iter().fold(0_usize, |n, b| (n << 8) | usize::from(*b)), rest)
    };
    (rest.len() >= len).then(|| (tag, &rest[..len], &rest[len..]))
}

fn expect(input: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    element(input).filter(|(t, ..)| *t == tag).map(|(_, content, rest)| (content, rest))
}

/// The subject of a certificate in DER; `None` where it is no certificate.
pub(crate) fn subject(certificate: &[u8]) -> Option<Subject> {
    let (certificate, _) = expect(certificate, SEQUENCE)?;
    let (mut tbs, _) = expect(certificate, SEQUENCE)?;
    if let Some((_, rest)) = expect(tbs, EXPLICIT_0) {
        tbs = rest;
    }
    // serial number, signature algorithm, issuer, validity
    for _ in 0..4 {
        tbs = element(tbs)?.2;
    }
    let (mut names, _) = expect(tbs, SEQUENCE)?;
    let mut subject = Subject::default();
    while !names.is_empty() {
        let (set, rest) = expect(names, SET)?;
        names = rest;
        let (attribute, _) = expect(set, SEQUENCE)?;
        let (oid, value) = expect(attribute, OID)?;
        let (_, value, _) = element(value)?;
        let value = std::str::from_utf8(value).ok()?.to_owned();
        match oid {
            OID_CN => subject.cn = value,
            OID_O => subject.orgs.push(value),
            _ => {}
        }
    }
    Some(subject)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_subject_rcgen_wrote() {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "system:node:n1");
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = params.self_signed(&key).unwrap();
        let got = subject(cert.der()).unwrap();
        assert_eq!(got, Subject { cn: "system:node:n1".into(), orgs: vec!["system:nodes".into()] });
        assert_eq!(subject(&cert.der()[..40]), None);
        assert_eq!(subject(b""), None);
    }
}
