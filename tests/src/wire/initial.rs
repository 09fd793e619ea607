//! Opens QUIC version 1 Initial packets (RFC 9001 section 5): their keys derive from the client's first Destination
//! Connection ID, so anybody on the path can do this.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context as _, Result, ensure};
use aws_lc_rs::aead::quic::{AES_128, HeaderProtectionKey};
use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{self, HKDF_SHA256, KeyType, Prk, Salt};

/// RFC 9001 section 5.2.
const SALT: [u8; 20] = [
    0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4, 0xc8, 0x0c, 0xad, 0xcc,
    0xbb, 0x7f, 0x0a,
];
const VERSION_1: [u8; 4] = [0, 0, 0, 1];
const FRAME_PADDING: u64 = 0x00;
const FRAME_PING: u64 = 0x01;
const FRAME_ACK: u64 = 0x02;
const FRAME_ACK_ECN: u64 = 0x03;
const FRAME_CRYPTO: u64 = 0x06;
const FRAME_CLOSE: u64 = 0x1c;

/// Who sent an Initial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    Client,
    Server,
}

impl Side {
    fn label(self) -> &'static str {
        match self {
            Self::Client => "client in",
            Self::Server => "server in",
        }
    }
}

/// What was read of one connection's Initials.
#[derive(Clone, Debug, Default)]
pub struct Handshake {
    /// Reassembled CRYPTO bytes of each side, by offset.
    crypto: BTreeMap<(Side, u64), Vec<u8>>,
}

impl Handshake {
    /// The CRYPTO stream of one side from its start, as far as it is whole.
    pub fn crypto(&self, side: Side) -> Vec<u8> {
        let mut out = Vec::new();
        for ((_, offset), bytes) in self.crypto.range((side, 0)..=(side, u64::MAX)) {
            let known = (out.len() as u64).saturating_sub(*offset) as usize;
            if *offset > out.len() as u64 {
                break;
            }
            out.extend_from_slice(bytes.get(known..).unwrap_or_default());
        }
        out
    }
}

/// Opens Initials in the order in which they crossed the wire.
#[derive(Debug, Default)]
pub struct InitialReader {
    /// Connections by their original destination ID.
    pub handshakes: HashMap<Vec<u8>, Handshake>,
    /// A client's source ID to its connection; packets to it are the server's.
    clients: HashMap<Vec<u8>, Vec<u8>>,
    /// Plaintext of every packet opened.
    pub plaintexts: Vec<Vec<u8>>,
    /// Initials that no known key opens, with their destination ID.
    pub unopened: usize,
}

impl InitialReader {
    /// Reads the Initials at the start of a UDP payload; other packets are left alone.
    pub fn read(&mut self, mut datagram: &[u8]) -> Result<()> {
        while let Some(header) = Header::parse(datagram) {
            let header = header?;
            let whole = datagram.get(..header.end).context("an Initial is longer than its datagram")?;
            let opened = self.keys_for(&header).into_iter().find_map(|(original, side)| {
                Some((open(whole, &header, &original, side).ok()?, original, side))
            });
            match opened {
                None => self.unopened += 1,
                Some((plaintext, original, side)) => {
                    if side == Side::Client {
                        self.clients.insert(header.source.to_vec(), original.clone());
                    }
                    let handshake = self.handshakes.entry(original).or_default();
                    crypto_frames(&plaintext, side, handshake)?;
                    self.plaintexts.push(plaintext);
                }
            }
            datagram = datagram.get(header.end..).unwrap_or_default();
        }
        Ok(())
    }

    fn keys_for(&self, header: &Header<'_>) -> Vec<(Vec<u8>, Side)> {
        let known = [(header.destination, Side::Server), (header.source, Side::Client)];
        let known = known.into_iter().filter_map(|(id, side)| Some((self.clients.get(id)?.clone(), side)));
        known.chain([(header.destination.to_vec(), Side::Client)]).collect()
    }
}

/// The readable part of an Initial (RFC 9000 section 17.2.2).
struct Header<'a> {
    destination: &'a [u8],
    source: &'a [u8],
    number_at: usize,
    end: usize,
}

impl<'a> Header<'a> {
    /// `None` when the datagram does not begin with an Initial.
    fn parse(datagram: &'a [u8]) -> Option<Result<Self>> {
        let first = *datagram.first()?;
        if first & 0xf0 != 0xc0 || datagram.get(1..5)? != VERSION_1 {
            return None;
        }
        Some(Self::rest(datagram).context("an Initial's header is cut short"))
    }

    fn rest(datagram: &'a [u8]) -> Option<Self> {
        let destination_len = usize::from(*datagram.get(5)?);
        let destination = datagram.get(6..6 + destination_len)?;
        let mut at = 6 + destination_len;
        let source_len = usize::from(*datagram.get(at)?);
        let source = datagram.get(at + 1..at + 1 + source_len)?;
        at += 1 + source_len;
        let token_len = usize::try_from(varint(datagram, &mut at)?).ok()?;
        at = at.checked_add(token_len)?;
        let length = usize::try_from(varint(datagram, &mut at)?).ok()?;
        Some(Self { destination, source, number_at: at, end: at.checked_add(length)? })
    }
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let first = *bytes.get(*at)?;
    let count = 1usize << (first >> 6);
    let rest = bytes.get(*at + 1..*at + count)?;
    *at += count;
    Some(rest.iter().fold(u64::from(first & 0x3f), |value, byte| (value << 8) | u64::from(*byte)))
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn secret(original: &[u8], side: Side) -> Result<Prk> {
    let initial = Salt::new(HKDF_SHA256, &SALT).extract(original);
    let mut secret = [0; 32];
    expand(&initial, side.label(), &mut secret)?;
    Ok(Prk::new_less_safe(HKDF_SHA256, &secret))
}

/// HKDF-Expand-Label of RFC 8446 section 7.1 with an empty context.
fn expand(secret: &Prk, label: &str, out: &mut [u8]) -> Result<()> {
    let length = u16::try_from(out.len())?.to_be_bytes();
    let label = format!("tls13 {label}");
    let info: [&[u8]; 4] = [&length, &[u8::try_from(label.len())?], label.as_bytes(), &[0]];
    let okm: hkdf::Okm<'_, Length> =
        secret.expand(&info, Length(out.len())).ok().context("HKDF-Expand-Label")?;
    okm.fill(out).ok().context("HKDF-Expand-Label")
}

/// Removes header protection and opens the packet: RFC 9001 sections 5.3 and 5.4.
fn open(whole: &[u8], header: &Header<'_>, original: &[u8], side: Side) -> Result<Vec<u8>> {
    let secret = secret(original, side)?;
    let (mut key, mut iv, mut hp) = ([0; 16], [0; 12], [0; 16]);
    expand(&secret, "quic key", &mut key)?;
    expand(&secret, "quic iv", &mut iv)?;
    expand(&secret, "quic hp", &mut hp)?;
    let hp = HeaderProtectionKey::new(&AES_128, &hp).ok().context("header protection key")?;
    let sample = whole.get(header.number_at + 4..header.number_at + 20).context("no sample")?;
    let mask = hp.new_mask(sample).ok().context("header protection mask")?;
    let mut packet = whole.to_vec();
    let first = packet.first_mut().context("empty packet")?;
    *first ^= mask[0] & 0x0f;
    let number_len = usize::from(*first & 0b11) + 1;
    let mut number = 0u64;
    for (offset, mask) in mask.iter().skip(1).take(number_len).enumerate() {
        let byte = packet.get_mut(header.number_at + offset).context("no packet number")?;
        *byte ^= mask;
        number = (number << 8) | u64::from(*byte);
    }
    // Handshakes have few packets: what is sent of the number is all of it.
    for (byte, number) in iv.iter_mut().skip(4).zip(number.to_be_bytes()) {
        *byte ^= number;
    }
    let split = header.number_at + number_len;
    let (associated, sealed) = packet.split_at_mut_checked(split).context("no payload")?;
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key).ok().context("AEAD key")?);
    let plaintext = key
        .open_in_place(Nonce::assume_unique_for_key(iv), Aad::from(&*associated), sealed)
        .ok()
        .context("not this connection's key")?;
    Ok(plaintext.to_vec())
}

/// Collects the CRYPTO frames; any frame that an Initial must not carry is an error (RFC 9000 section 17.2.2).
fn crypto_frames(plaintext: &[u8], side: Side, into: &mut Handshake) -> Result<()> {
    let mut at = 0;
    while at < plaintext.len() {
        let cut = "a frame is cut short";
        match varint(plaintext, &mut at).context(cut)? {
            FRAME_PADDING | FRAME_PING => {}
            kind @ (FRAME_ACK | FRAME_ACK_ECN) => {
                let mut next = || varint(plaintext, &mut at).context(cut);
                let (_, _, ranges, _) = (next()?, next()?, next()?, next()?);
                for _ in 0..ranges * 2 + if kind == FRAME_ACK_ECN { 3 } else { 0 } {
                    next()?;
                }
            }
            FRAME_CRYPTO => {
                let offset = varint(plaintext, &mut at).context(cut)?;
                let length = usize::try_from(varint(plaintext, &mut at).context(cut)?)?;
                let bytes = plaintext.get(at..at + length).context(cut)?;
                at += length;
                into.crypto.insert((side, offset), bytes.to_vec());
            }
            FRAME_CLOSE => return Ok(()),
            other => ensure!(false, "frame {other:#x} in an Initial"),
        }
    }
    Ok(())
}

/// Types of the extensions of a ClientHello (RFC 8446 section 4.1.2), from the CRYPTO stream of a client.
pub fn client_hello_extensions(crypto: &[u8]) -> Option<Vec<u16>> {
    const CLIENT_HELLO: u8 = 1;
    // Type 1, length 3, version 2, random 32.
    let mut at = 1 + 3 + 2 + 32;
    (*crypto.first()? == CLIENT_HELLO).then_some(())?;
    at += 1 + usize::from(*crypto.get(at)?);
    at += 2 + usize::from(be16(crypto, at)?);
    at += 1 + usize::from(*crypto.get(at)?);
    let end = at + 2 + usize::from(be16(crypto, at)?);
    at += 2;
    let mut types = Vec::new();
    while at < end {
        types.push(be16(crypto, at)?);
        at += 4 + usize::from(be16(crypto, at + 2)?);
    }
    Some(types)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The server's Initial of RFC 9001 appendix A.3.
    const SERVER: &str = "cf000000010008f067a5502a4262b5004075c0d95a482cd0991cd25b0aac406a5816b6394100f37a1c69797554780bb3\
        8cc5a99f5ede4cf73c3ec2493a1839b3dbcba3f6ea46c5b7684df3548e7ddeb9c3bf9c73cc3f3bded74b562bfb19fb84022f8ef4cdd9\
        3795d77d06edbb7aaf2f58891850abbdca3d20398c276456cbc42158407dd074ee";

    #[test]
    fn the_example_of_the_rfc_opens() {
        let packet: Vec<u8> = (0..SERVER.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&SERVER[at..at + 2], 16).unwrap())
            .collect();
        let original = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];
        let mut reader = InitialReader::default();
        // The example's client has an empty source ID.
        reader.clients.insert(Vec::new(), original.to_vec());
        reader.read(&packet).unwrap();
        assert_eq!((reader.plaintexts.len(), reader.unopened), (1, 0));
        let hello = reader.handshakes[&original[..]].crypto(Side::Server);
        assert_eq!((hello.len(), hello[0]), (90, 2));
        let mut flipped = packet.clone();
        *flipped.last_mut().unwrap() ^= 1;
        reader.read(&flipped).unwrap();
        assert_eq!(reader.unopened, 1);
    }
}
