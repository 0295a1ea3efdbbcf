from warpformer.cli import main

main()
