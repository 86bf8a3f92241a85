//! Feature columns of a ranker. A manifest names them; serving and `tastemaker features` compute them with this code.
//!
//! `h` is the user's history as planned (at most `pipeline.history_length` entries); "liked" entries have weight > 0.
//!
//! | column | value for a candidate |
//! |---|---|
//! | `candidate.SOURCE.score` | the source's own score, 0 where it did not propose the item |
//! | `candidate.SOURCE.rank` | 1 / rank in the source's list, 0 where it did not propose the item |
//! | `candidate.SOURCE.present` | 1 or 0 |
//! | `cross.dot` | the metric's score of user and item vector, for every candidate; 0 without vectors |
//! | `cross.cooccurrence_sum` | Σ over liked h of weight · similarity, for every candidate |
//! | `cross.cooccurrence_max`, `_count`, `_mean`, `_top3` | largest; ln(1 + number); sum / number; sum of the three largest |
//! | `cross.same_creator` | ln(1 + Σ over the item's creators of liked h entries that share it) |
//! | `cross.same_category` | share of liked h whose category is the item's |
//! | `cross.same_series` | ln(1 + liked h entries of the item's series) |
//! | `cross.next_in_series` | 1 if the item is the one after the furthest entry of its series in h |
//! | `cross.series_gap` | item's position minus the furthest position in h of its series, within ±10; 0 without |
//! | `cross.overlap.COLUMN` | mean over the item's values in COLUMN of the share of liked h with that value |
//! | `user.embedding`, `item.embedding` | `[dim]` values; 0 without |
//! | `user.COLUMN`, `item.COLUMN` | number column; its default where missing or unknown |
//! | `user.history_length` | ln(1 + entries of h) |
//! | `item.popularity` | ln(1 + trending score) |
//! | `context.KEY` | the context value as a number, 0 where absent or not a number |

pub mod assemble;
pub(crate) mod history;
