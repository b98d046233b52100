"""Which checkpoint of a finished training is tested: what each rule costs on four data sets."""
