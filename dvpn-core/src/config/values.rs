//! Values that need more than `FromStr`. Each error says what is wanted.

use std::net::{IpAddr, SocketAddr};

use url::Url;

use crate::address::is_unicast;

pub(super) fn port(text: &str) -> Result<u16, String> {
    text.parse()
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| "must be a port from 1 to 65535".to_owned())
}

pub(super) fn endpoint(text: &str, port: u16) -> Result<SocketAddr, String> {
    let bare = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    text.parse()
        .ok()
        .or_else(|| bare.ok().map(|address| SocketAddr::new(address, port)))
        .filter(|endpoint: &SocketAddr| endpoint.port() > 0 && is_unicast(endpoint.ip()))
        .ok_or_else(|| "must be IP or IP:port, like 198.51.100.7:51820 or [2001:db8::7]:51820".to_owned())
}

pub(super) fn https_url(text: &str) -> Result<Url, String> {
    let mut url = Url::parse(text)
        .ok()
        .ok_or("must be a URL like https://pool.example:8443/providers")?;
    if url.scheme() != "https" {
        return Err("must begin with https://: tokens never travel in the clear".to_owned());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not hold a user or password".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("must not hold ? or #: paths are added at its end".to_owned());
    }
    let path = url.path().trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

/// An address that is asked in the clear, because what stands between can only answer such.
pub(super) fn http_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text)
        .ok()
        .filter(|url| url.scheme() == "http" && url.has_host())
        .ok_or("must be a URL like http://check.example/")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not hold a user or password".to_owned());
    }
    Ok(url)
}

/// Decimal megabits per second to bits per second, exactly; digits below one bit are cut.
pub(super) fn megabits(text: &str) -> Result<u64, String> {
    let wrong = || "must be a number of megabits per second up to 1000000, like 100 or 2.5".to_owned();
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err(wrong());
    }
    let whole = whole
        .parse::<u64>()
        .ok()
        .filter(|mbps| *mbps <= 1_000_000)
        .ok_or_else(wrong)?;
    let fraction = fraction.bytes().chain(std::iter::repeat(b'0')).take(6);
    Ok(whole * 1_000_000 + fraction.fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
}
