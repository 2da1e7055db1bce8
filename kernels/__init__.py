"""The operations a GPT spends its time in, one a file, each behind one public function for every device."""
