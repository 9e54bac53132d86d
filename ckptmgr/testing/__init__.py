"""What users need to test their own storage: a conformance suite, a faulty storage, one in memory."""
