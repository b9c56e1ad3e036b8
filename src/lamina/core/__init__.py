"""Plain data: vocabulary, documents, registry and errors. Never imports torch."""
