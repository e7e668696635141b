"""SGLang's own test kits against a running server: which, how, and a page of what two servers did."""
