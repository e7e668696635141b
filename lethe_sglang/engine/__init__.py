"""Everything that touches SGLang's scheduler."""
