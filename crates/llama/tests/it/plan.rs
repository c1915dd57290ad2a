//! The split over ranks: nothing lost, nothing twice, nobody idle, for any sizes.

use dromedary_llama::{Error, LlamaConfig, Plan, RankPlan, Shard, TrainedTensor};
use proptest::prelude::*;
use serde_json::json;

fn model(heads: i64, kv_heads: i64, head_dim: i64, ffn: i64, vocab: i64) -> LlamaConfig {
    let config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": ffn, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "vocab_size": vocab
    });
    LlamaConfig::from_json(config.to_string().as_bytes(), "config.json".as_ref()).unwrap()
}

fn rows(shard: Shard) -> (std::ops::Range<i64>, i64) {
    match shard {
        Shard::Rows(slice) | Shard::Columns(slice) => (slice.range(), slice.full()),
        Shard::Replicated => panic!("replicated"),
    }
}

/// Ranges of neighbouring ranks meet, and together are the whole.
fn assert_partition(plan: &Plan, part: impl Fn(&RankPlan) -> (std::ops::Range<i64>, i64)) {
    let mut next = 0;
    let mut full = 0;
    for rank in 0..plan.tp() {
        let (range, size) = part(plan.rank(rank));
        assert_eq!(range.start, next);
        assert!(range.end > range.start, "rank {rank} of {} has nothing", plan.tp());
        (next, full) = (range.end, size);
    }
    assert_eq!(next, full);
}

fn assert_heads(plan: &Plan, heads: usize, kv_heads: usize) {
    let per_kv = heads / kv_heads;
    let mut seen = Vec::new();
    for rank in (0..plan.tp()).map(|rank| plan.rank(rank)) {
        for (kv_head, q_heads) in &rank.groups {
            assert!(!q_heads.is_empty());
            assert!(q_heads.clone().all(|head| head / per_kv == *kv_head));
            seen.extend(q_heads.clone());
        }
        let kv: Vec<_> = rank.groups.iter().map(|(kv_head, _)| *kv_head).collect();
        assert_eq!(kv, rank.kv_heads().collect::<Vec<_>>());
        assert_eq!(rank.n_local_heads(), rank.q_heads().len() as i64);
        let local: Vec<_> =
            rank.local_groups().into_iter().flat_map(|(_, q_heads)| q_heads).collect();
        assert_eq!(local, (0..rank.q_heads().len()).collect::<Vec<_>>());
        let [q, k, v] = rank.local_qkv_rows();
        assert!(q.end == k.start && k.end == v.start && k.end - k.start == v.end - v.start);
    }
    assert_eq!(seen, (0..heads).collect::<Vec<_>>());
    let counts: Vec<_> = (0..plan.tp()).map(|rank| plan.rank(rank).n_local_heads()).collect();
    assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
}

proptest! {
    #[test]
    fn every_row_belongs_to_one_rank(
        kv_heads in 1_i64..12, group in 1_i64..8, half_dim in 1_i64..20,
        ffn in 1_i64..700, vocab in 1_i64..900, choice in 0_i64..1000,
    ) {
        let heads = kv_heads * group;
        let tp = 1 + choice % heads;
        prop_assume!(tp <= ffn.min(vocab));
        let config = model(heads, kv_heads, 2 * half_dim, ffn, vocab);
        let plan = Plan::new(&config, tp as usize).unwrap();
        assert_heads(&plan, heads as usize, kv_heads as usize);
        for name in ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"] {
            assert_partition(&plan, |rank| rows(rank.shard(&format!("model.x.{name}.weight"))));
        }
        assert_partition(&plan, |rank| (rank.intermediate.clone(), ffn));
        assert_partition(&plan, |rank| (rank.vocab.clone(), vocab));
        assert_partition(&plan, |rank| rows(rank.tied_head()));
        for rank in (0..plan.tp()).map(|rank| plan.rank(rank)) {
            // Column- and row-parallel halves of a block meet in the same indices.
            prop_assert_eq!(rows(rank.shard("q_proj")), rows(rank.shard("o_proj")));
            prop_assert_eq!(rows(rank.shard("up_proj")), rows(rank.shard("down_proj")));
            let (kv, all) = rows(rank.shard("k_proj"));
            prop_assert_eq!(all, kv_heads * 2 * half_dim);
            prop_assert_eq!(kv.end - kv.start, rank.n_local_kv_heads() * 2 * half_dim);
        }
    }

    #[test]
    fn every_trained_number_has_one_owner(
        kv_heads in 1_usize..9, group in 1_usize..9, half_dim in 1_i64..4, choice in 0_usize..1000,
    ) {
        let heads = kv_heads * group;
        let tp = 1 + choice % heads;
        let plan = Plan::new(&model(heads as i64, kv_heads as i64, 2 * half_dim, 97, 101), tp).unwrap();
        let holders: Vec<_> = (0..kv_heads).map(|head| plan.kv_head_holders(head)).collect();
        for (head, holders) in holders.iter().enumerate() {
            for rank in 0..tp {
                prop_assert_eq!(plan.rank(rank).kv_heads().contains(&head), holders.contains(&rank));
            }
        }
        for (module, tensor) in [
            ("k_proj", TrainedTensor::LoraB), ("v_proj", TrainedTensor::Weight), ("q_proj", TrainedTensor::LoraB),
            ("o_proj", TrainedTensor::LoraA), ("down_proj", TrainedTensor::Weight), ("lm_head", TrainedTensor::Weight),
        ] {
            let parts: Vec<_> = (0..tp).map(|rank| plan.trained_part(rank, module, tensor).unwrap()).collect();
            let mut next = 0;
            let mut full = 0;
            for (rank, part) in parts.iter().enumerate() {
                prop_assert_eq!(part.shard(), &plan.rank(rank).shard(module));
                prop_assert_eq!(part.shared(), parts[0].shared());
                let Some(owned) = part.owned() else { continue };
                let (range, size) = rows(owned.clone());
                prop_assert_eq!(range.start, next);
                (next, full) = (range.end, size);
            }
            prop_assert_eq!(next, full, "{} is owned once", module);
            let dim = 2 * half_dim;
            let shared = holders.iter().enumerate().filter(|(_, ranks)| ranks.len() > 1);
            let shared: Vec<_> = shared.map(|(head, _)| head as i64 * dim..(head + 1) as i64 * dim).collect();
            let of_kv_heads = matches!(module, "k_proj" | "v_proj");
            prop_assert_eq!(parts[0].shared(), if of_kv_heads { &shared[..] } else { &[] });
        }
        for (module, tensor) in [
            ("q_proj", TrainedTensor::LoraA), ("k_proj", TrainedTensor::LoraA), ("o_proj", TrainedTensor::LoraB),
            ("input_layernorm", TrainedTensor::Weight),
        ] {
            let parts = (0..tp).map(|rank| plan.trained_part(rank, module, tensor).unwrap());
            prop_assert_eq!(parts.clone().filter(|part| part.owned().is_some()).count(), 1);
            prop_assert!(parts.clone().all(|part| part.is_replicated()));
        }
    }

    #[test]
    fn ranges_are_cut_at_units_where_they_can_be(units in 1_i64..40, rest in 0_i64..64, tp in 1_usize..9) {
        let ffn = units * 64 + rest;
        prop_assume!(units + i64::from(rest > 0) >= tp as i64);
        let plan = Plan::new(&model(64, 8, 2, ffn, 64 * 9), tp).unwrap();
        for rank in 0..tp {
            prop_assert_eq!(plan.rank(rank).intermediate.start % 64, 0);
            prop_assert_eq!(plan.rank(rank).vocab.start % 64, 0);
        }
    }
}

#[test]
fn kinds_of_shards_follow_the_layers() {
    let plan = Plan::new(&model(6, 3, 4, 64, 64), 2).unwrap();
    let rank = plan.rank(1);
    for name in ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] {
        assert!(matches!(rank.shard(&format!("model.layers.3.x.{name}.weight")), Shard::Rows(_)));
    }
    for name in ["o_proj", "down_proj"] {
        assert!(matches!(
            rank.shard(&format!("model.layers.3.x.{name}.weight")),
            Shard::Columns(_)
        ));
    }
    for name in
        ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"]
    {
        assert_eq!(rank.shard(name), Shard::Replicated);
    }
}

#[test]
fn even_splits_have_uniform_groups() {
    // LLaMA-2-70B on 8 ranks: one key/value head each.
    let plan = Plan::new(&model(64, 8, 128, 28672, 32000), 8).unwrap();
    for rank in 0..8 {
        assert_eq!(plan.rank(rank).groups, [(rank, 8 * rank..8 * rank + 8)]);
        assert_eq!(plan.rank(rank).uniform_group_size(), Some(8));
    }
}

#[test]
fn remainders_of_heads_and_columns_go_to_opposite_ends() {
    // SmolLM2: 9 query heads over 3 key/value heads.
    let plan = Plan::new(&model(9, 3, 64, 1536 + 64, 49152), 2).unwrap();
    assert_eq!(plan.rank(0).groups, [(0, 0..3), (1, 3..5)]);
    assert_eq!(plan.rank(1).groups, [(1, 5..6), (2, 6..9)]);
    assert_eq!(plan.rank(1).local_groups(), [(0, 0..1), (1, 1..4)]);
    assert_eq!(plan.rank(1).uniform_group_size(), None);
    assert_eq!(
        (plan.rank(0).intermediate.clone(), plan.rank(1).intermediate.clone()),
        (0..768, 768..1600)
    );
}

#[test]
fn too_many_ranks_are_refused_with_both_numbers() {
    let error = Plan::new(&model(9, 3, 64, 1536, 49152), 10).unwrap_err();
    assert!(matches!(error, Error::TooManyRanks { tp: 10, count: 9, .. }));
    let text = error.to_string();
    assert!(text.contains("10") && text.contains("9 query heads"), "{text}");
    assert!(Plan::new(&model(9, 3, 64, 5, 49152), 6).unwrap_err().to_string().contains("5 feed"));
    assert!(Plan::new(&model(9, 3, 64, 64, 64), 0).is_err());
}
