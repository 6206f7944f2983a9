//! Up to which dead letters something goes that takes several requests.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use super::Operated;
use super::problem::Problem;
use crate::ledger::Filter;

/// The highest number of what something goes up to. Where relays share a journal, numbers grow in each of its partitions
/// by itself: then it is a list with that of each. To be passed on as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub(super) enum UpTo {
    Number(i64),
    Each(Vec<i64>),
}

impl UpTo {
    /// What there is now of what the filter lets through.
    pub(super) async fn now(operated: &Operated, filter: Filter) -> Result<Self, Problem> {
        let ends = operated.letters.read(move |letters| letters.ends(&filter)).await?;
        Ok(match operated.cluster {
            None => Self::Number(ends.into_iter().max().unwrap_or(0)),
            Some(_) => Self::Each(ends),
        })
    }

    /// As a filter has them: of all numbers, and of each partition's.
    pub(super) fn bounds(self) -> (Option<i64>, Option<Vec<i64>>) {
        match self {
            Self::Number(number) => (Some(number), None),
            Self::Each(ends) => (None, Some(ends)),
        }
    }

    /// Reads one that may be missing; in a query it is the text that it is in JSON.
    pub(super) fn optional<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Self>, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Given {
            UpTo(UpTo),
            Text(String),
        }
        let wrong = |_| D::Error::custom("up_to is a number, or a list of numbers, as an earlier answer has it");
        Ok(match Option::<Given>::deserialize(deserializer).map_err(wrong)? {
            None => None,
            Some(Given::UpTo(up_to)) => Some(up_to),
            Some(Given::Text(text)) => Some(serde_json::from_str(&text).map_err(D::Error::custom)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn it_is_read_as_it_is_written() {
        let read = |value: serde_json::Value| UpTo::optional(value);
        for (up_to, text) in [(UpTo::Number(7), "7"), (UpTo::Each(vec![7, 1 << 44]), "[7,17592186044416]")] {
            assert_eq!(json!(up_to).to_string(), text);
            assert_eq!(read(json!(up_to)).unwrap(), Some(up_to.clone()));
            assert_eq!(read(json!(text)).unwrap(), Some(up_to), "in a query");
        }
        assert_eq!(read(json!(null)).unwrap(), None);
        for wrong in [json!("x"), json!("7,8"), json!([1.5]), json!({})] {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
