"""Results on their way into the blob store: fetched, validated, recorded, swept."""
