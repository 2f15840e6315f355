from longrl.cli import main

main()
