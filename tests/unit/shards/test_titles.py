"""Titles that name one product, and the product groups of stored items."""

from __future__ import annotations

from rating_train.shards.titles import product_group, title_key


def test_title_key_forgets_what_tells_variants_apart() -> None:
    blue = title_key("Spigen Ultra Hybrid Case for iPhone 14 (TPU | Matte Black)")
    assert blue == "spigen ultra hybrid case for iphone 14"
    assert blue == title_key("SPIGEN ultra-hybrid case, for iPhone 14 [Sierra Blue]")
    assert blue != title_key("Spigen Ultra Hybrid Case for iPhone 13 (TPU)")
    assert title_key("T-Shirt (Red)") == "", "too short to mean one product"
    assert title_key("") == ""


def test_items_of_one_product_share_a_group_and_items_without_a_title_key_are_alone() -> None:
    def group(item: str, title: str, category: str = "Phones") -> str:
        return product_group({"id": item, "title": title, "main_category": category})

    blue = group("a", "Spigen Ultra Hybrid Case for iPhone 14 (Blue)")
    assert blue == group("b", "SPIGEN ultra-hybrid case for iPhone 14 [Black]") and len(blue) == 16
    assert blue != group("b", "Spigen Ultra Hybrid Case for iPhone 14 (Blue)", "Toys")
    assert group("a", "Case") != group("b", "Case")
    assert group("a", "Case") == group("a", "Cover")
