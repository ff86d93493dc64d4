//! Choices of providers as people write them.

use dvpn_common::ids::{ProviderId, Region};

use crate::session::Choice;

/// Reads two lists whose entries are a provider's id or `region:NAME`. The error says which entry does not read.
pub fn parse_choice(only: &[String], exclude: &[String]) -> Result<Choice, String> {
    let (only_ids, only_regions) = split(only)?;
    let (exclude_ids, exclude_regions) = split(exclude)?;
    Ok(Choice {
        only_ids,
        only_regions,
        exclude_ids,
        exclude_regions,
    })
}

fn split(entries: &[String]) -> Result<(Vec<ProviderId>, Vec<Region>), String> {
    let (mut ids, mut regions) = (Vec::new(), Vec::new());
    for entry in entries {
        match entry.strip_prefix("region:") {
            Some(region) => regions.push(
                region
                    .parse()
                    .map_err(|error| format!("{entry:?} is no region: {error}"))?,
            ),
            None => ids.push(
                entry
                    .parse()
                    .map_err(|error| format!("{entry:?} is no provider: {error}"))?,
            ),
        }
    }
    Ok((ids, regions))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_ids_or_regions() {
        let choice = parse_choice(&["provider-a".into(), "region:de".into()], &["region:us".into()]).unwrap();
        assert_eq!(choice.only_ids[0].as_str(), "provider-a");
        assert_eq!(choice.only_regions[0].as_str(), "de");
        assert_eq!(choice.exclude_regions[0].as_str(), "us");
        assert!(parse_choice(&["region:".into()], &[]).unwrap_err().contains("region:"));
        assert!(parse_choice(&[], &["a b".into()]).is_err());
    }
}
